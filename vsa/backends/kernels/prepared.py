# SPDX-License-Identifier: Apache-2.0
"""A whole call of attention, prepared once: then a run allocates, fills in addresses, launches.

The calls are those that run one by one elsewhere, built from placeholders instead of tensors, so
that both paths launch the same kernels with the same numbers and give the same bits. A forward
crosses into C++ once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, auto
from typing import Any

import torch
from torch import Tensor

from vsa.backends.base import Forward, Ready
from vsa.backends.kernels import low_precision
from vsa.backends.kernels.calls import (
    Located3,
    LocatedGates,
    Shared,
    axis_call,
    forward_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.placeholder import (
    Placeholder,
    Workspace,
    contiguous_strides,
    part_of,
)
from vsa.backends.kernels.prepared_backward import PreparedBackward
from vsa.backends.kernels.prepared_cached import CachedCoarse, Held
from vsa.backends.kernels.prepared_coarse import CoarseForward, mean_shapes
from vsa.backends.kernels.prepared_padded import PaddedCalls, kept_of
from vsa.backends.kernels.sub_blocks import is_scale
from vsa.backends.kernels.tail_calls import round_call, tail_tensors
from vsa.backends.kernels.tensors import contiguous_copy, is_addressable
from vsa.backends.kernels.text import Text, text_of
from vsa.values.bitmap import num_words
from vsa.values.problem import Means, Upstream
from vsa.values.ring import Ring
from vsa.values.task import Task


class Slot(IntEnum):
    """Tensors whose addresses a forward is given, in this order."""

    Q = 0
    K = auto()
    V = auto()
    GATE_FINE = auto()
    GATE_COARSE = auto()
    TEXT_VALID = auto()
    GIVEN_BITMAP = auto()
    SIZES = auto()
    KV_SIZES = auto()
    LISTED = auto()
    COUNTS = auto()
    WORK = auto()
    OUT = auto()
    FINE = auto()
    KEPT = auto()
    LSE = auto()
    BITMAP = auto()
    COARSE = auto()
    MEANS = auto()
    HELD_TOKENS = auto()
    HELD_MEANS = auto()
    HELD_NUMBERS = auto()


NUM_GIVEN = int(Slot.WORK)
"""Tensors that a call gives: without all of them, others would be read by wrong addresses."""


def can_prepare(task: Task) -> bool:
    """Whether the kernels compute it without more ado."""
    from vsa import _C

    return (
        task.scale > 0
        and (task.runs == 1 or is_scale(task.scale))
        and len(task.counts) <= _C.MOST_HEAD_BUDGETS
        and not (task.mask is not None and (task.tail or task.runs > 1))
        and (task.ring is None or _can_hold(task, task.ring))
    )


def _can_hold(task: Task, ring: Ring) -> bool:
    """The same of a call with a cache, whose means lie apart until it is full."""
    return task.runs == 1 and not task.gradients and (ring.is_full or not task.tail)


class PreparedAttention:
    """See ``vsa.backends.base.Prepared``."""

    def __init__(self, machine: Machine, task: Task) -> None:
        from vsa import _C

        self.machine, self.device = machine, task.q.device
        task = self._with_copies(task)
        has_coarse = task.gate_coarse is not None
        # What a backward needs of the coarse branch is kept, and the fine output before its gates.
        self.keeps_coarse = has_coarse and task.gradients
        self.keeps_means = (has_coarse or task.tail) and task.gradients
        self.keeps_fine = task.gradients and (has_coarse or task.gate_fine is not None)
        batch, length, heads, head_dim = task.q.shape
        work, means, kept = Workspace(Slot.WORK), Workspace(Slot.MEANS), Workspace(Slot.KEPT)
        axes, counters = (kept.part(shape, torch.int32) for shape in ((batch, heads), (2,)))
        self.lse = _result(kept, Slot.LSE, task.gives_lse, (batch, heads, length), torch.float32)
        self.gives_lse = task.gives_lse
        self.gives_bitmap = task.bitmap is None and task.gives_bitmap
        if task.bitmap is None:
            shape = batch, heads, task.grid.num_tiles, num_words(task.kv_grid.num_tiles)
            self.bitmap = _result(kept, Slot.BITMAP, task.gives_bitmap, shape, torch.int32)
        else:
            self.bitmap = placeholder(Slot.GIVEN_BITMAP, task.bitmap)
        self.coarse: Placeholder | None = None
        if has_coarse:
            shape = mean_shapes(task)[0]
            self.coarse = _result(work, Slot.COARSE, self.keeps_coarse, shape, torch.float32)
        self.padded = kept_of(task, kept)
        padded = PaddedCalls(task, self.padded, lambda name: Slot[name])
        held: Held | None = None
        of_tiles: CoarseForward | CachedCoarse
        if task.ring is None:
            of_means = means if self.keeps_means else work
            of_tiles = CoarseForward(task, self.coarse, of_means, work, padded.sizes)
        else:
            held = Held(task, (Slot.HELD_TOKENS, Slot.HELD_MEANS, Slot.HELD_NUMBERS))
            of_tiles = CachedCoarse(task, self.coarse, work, held)
        self.means = of_tiles.means

        tokens = [placeholder(Slot.Q, task.q), placeholder(Slot.K, task.k)]
        tokens.append(placeholder(Slot.V, task.v))
        q, k, v = tokens
        attended: Placeholder = self.bitmap  # as the fine stage reads it
        turned: list[Any] = []
        if held is not None:
            k, v = held.keys, held.values
            if held.order is not None and (task.bitmap is not None or task.gives_bitmap):
                attended = work.part(self.bitmap.shape, torch.int32)
                if task.bitmap is not None:
                    turned = [held.by_slots(self.bitmap, attended)]
                else:
                    turned = [held.by_time(attended, self.bitmap)]
        grids = task.grid, task.kv_grid
        valid = None if task.text_valid is None else placeholder(Slot.TEXT_VALID, task.text_valid)
        gates = LocatedGates(
            None if task.gate_fine is None else placeholder(Slot.GATE_FINE, task.gate_fine),
            None if task.gate_coarse is None else placeholder(Slot.GATE_COARSE, task.gate_coarse),
            self.coarse,
        )
        ordered = padded.order(axes, _C.query_tiles_per_group(head_dim), work, counters[1:])
        out, fine = (_contiguous(slot, task.q.shape, q.dtype) for slot in (Slot.OUT, Slot.FINE))

        def fine_call(gates: LocatedGates, fine: Placeholder | None, text: Text) -> Any:
            return forward_call(
                Located3(q, q),
                Located3(k, k),
                text.clean[0],
                Shared(
                    grids,
                    task.scale,
                    attended,
                    axes,
                    text.query_rows,
                    text.key_rows,
                    padded.sizes,
                ),
                gates,
                out,
                fine,
                self.lse,
                counters[:1],
                ordered.order,
            )

        def native_calls() -> tuple[list[Any], list[Any]]:
            """What reads the choice alone, and what comes after it."""
            # Scores of invalid keys are masked, whatever they are.
            text = text_of(valid, batch, head_dim, grids, [(v, task.kv_grid)], work.part)
            early = [axis_call(attended, axes, task.grid.tiles, counters), *ordered.calls]
            last = fine_call(gates, fine if self.keeps_fine else None, text)
            if not task.tail:
                return early, [*text.calls, last]
            # Gates come after the tail.
            kept_means = tail_tensors(batch, k.shape[2], task.kv_grid, head_dim, q.dtype, work.part)
            return early, [
                *text.calls,
                round_call(self.means[-2], self.means[-1], kept_means, task.kv_grid),
                fine_call(LocatedGates(), None, text),
                _C.TailForward(fine=last, tail=kept_means.keys()),
            ]

        if task.precision == "native":
            early, late = native_calls()
        else:
            asked = low_precision.Call(
                *(q, k, v, attended, valid, grids, task.scale, gates, out, self.lse),
                *(axes, task.precision),
            )
            blocks = machine.at_a_time(self.device)
            early, late = [], list(low_precision.forward_calls(asked, blocks, work.part))
        chosen = [*of_tiles.calls(tokens, attended), *padded.choice(self.bitmap)]
        calls = [*chosen, *turned, *early, *late]
        self.work_bytes, self.kept_bytes = work.nbytes, kept.nbytes
        self.mean_numbers = means.nbytes // 4
        steps = [call.step() for call in calls]
        self.program = _C.Program(steps)
        # What reads q and k alone, and the rest, for those whose v comes later.
        self.parts: tuple[_C.Program, _C.Program] | None = None
        halves = of_tiles.in_two(tokens, attended)
        if halves is not None:
            parts = [*halves[0], *early], [*halves[1], *late]
            one, other = (_C.Program([call.step() for call in part]) for part in parts)
            self.parts = one, other
        self.gradients = (
            PreparedBackward(machine, task, self.lse, self.bitmap, self.padded)
            if task.gradients
            else None
        )

    def _with_copies(self, task: Task) -> Task:
        """The task with copies in place of what the kernels cannot read."""
        tensors = [task.q, task.k, task.v]
        copied = {
            at
            for at, (x, misaligned) in enumerate(zip(tensors, task.misaligned, strict=True))
            if misaligned or not is_addressable(x)
        }
        for at in copied:
            tensors[at] = _like_a_copy(tensors[at])
        bitmap = task.bitmap
        if bitmap is not None and not bitmap.is_contiguous():
            copied.add(Slot.GIVEN_BITMAP)
            bitmap = _like_a_copy(bitmap)
        self.copied = frozenset(copied)
        q, k, v = tensors
        return task._replace(q=q, k=k, v=v, bitmap=bitmap)

    def _readable(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        """Tensors as the kernels can read them."""
        if not self.copied:
            return tensors
        return [
            contiguous_copy(x) if at in self.copied and x is not None else x
            for at, x in enumerate(tensors)
        ]

    def forward(
        self, *tensors: Tensor | None, ready: Ready | None = None, held: Sequence[Tensor] = ()
    ) -> Forward:
        """See ``Prepared.forward``."""
        if len(tensors) != NUM_GIVEN:
            raise ValueError(f"a prepared call takes {NUM_GIVEN} tensors, but got {len(tensors)}")
        parts = self.parts if ready is not None and not self.copied else None
        if ready is not None and parts is None:
            ready()
        given = self._readable(tensors)
        q = given[0]
        work = q.new_empty(self.work_bytes, dtype=torch.uint8)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        fine = torch.empty_like(out) if self.keeps_fine else out
        kept = q.new_empty(self.kept_bytes, dtype=torch.uint8)
        lse = q.new_empty(self.lse.shape, dtype=torch.float32) if self.gives_lse else None
        bitmap = q.new_empty(self.bitmap.shape, dtype=torch.int32) if self.gives_bitmap else None
        coarse = means = None
        if self.keeps_coarse and self.coarse is not None:
            coarse = q.new_empty(self.coarse.shape, dtype=torch.float32)
        if self.keeps_means:
            means = q.new_empty(self.mean_numbers, dtype=torch.float32)
        all_tensors = *given, work, out, fine, kept, lse, bitmap, coarse, means, *held
        addresses = [0 if x is None else x.data_ptr() for x in all_tensors]
        if parts is None:
            self.machine.run_program(self.program, addresses, self.device)
        else:
            assert ready is not None
            self.machine.run_program(parts[0], addresses, self.device)
            ready()
            self.machine.run_program(parts[1], addresses, self.device)
        return Forward(out, fine, kept, lse, bitmap, coarse, means)

    def backward(
        self, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """See ``Prepared.backward``."""
        assert self.gradients is not None
        return self.gradients(upstream, found, self._readable(tensors))

    def unpacked(self, found: Forward) -> tuple[Tensor, Tensor | None, Means]:
        """See ``Prepared.unpacked``."""
        lse, bitmap = found.lse, found.bitmap
        chosen = self.bitmap.slot != Slot.GIVEN_BITMAP
        if lse is None or (chosen and bitmap is None):
            kept = contiguous_copy(found.kept)  # at an aligned address
            lse = part_of(kept, self.lse) if lse is None else lse
            bitmap = part_of(kept, self.bitmap) if chosen and bitmap is None else bitmap
        if found.means is None:
            return lse, bitmap, Means(None, None, None)
        means = found.means.contiguous()
        return lse, bitmap, Means(*(part_of(means, mean) for mean in self.means))


def _like_a_copy(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def placeholder(slot: int, x: Tensor) -> Placeholder:
    """For a tensor (B, S, heads, head_dim) of a task."""
    return Placeholder(slot, tuple(x.shape), x.stride(), x.dtype)


def _contiguous(slot: int, shape: Sequence[int], dtype: torch.dtype) -> Placeholder:
    return Placeholder(slot, tuple(shape), contiguous_strides(shape), dtype)


def _result(
    kept: Workspace, slot: int, given: bool, shape: Sequence[int], dtype: torch.dtype
) -> Placeholder:
    """A tensor of its own where it is a result, else a part of what is kept."""
    return _contiguous(slot, shape, dtype) if given else kept.part(shape, dtype)
