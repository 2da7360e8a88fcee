# SPDX-License-Identifier: Apache-2.0
"""A whole call of attention, prepared once: then a run allocates, fills in addresses, launches.

The calls are those that run one by one elsewhere, built from placeholders instead of tensors, so
that both paths launch the same kernels with the same numbers and give the same bits. A forward
crosses into C++ once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum, auto
from typing import Any

import torch
from torch import Tensor

from vsa.backends.base import Forward
from vsa.backends.kernels import sub_blocks
from vsa.backends.kernels.calls import (
    Located3,
    LocatedGates,
    Shared,
    axis_call,
    forward_call,
    means_call,
)
from vsa.backends.kernels.coarse_calls import Choice, choice_calls, score_numbers
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.placeholder import (
    Placeholder,
    Workspace,
    contiguous_strides,
    part_of,
)
from vsa.backends.kernels.prepared_backward import PreparedBackward
from vsa.backends.kernels.tensors import Located, as_matrices, beginning, is_addressable
from vsa.backends.torch_coarse import SCORE_BYTES
from vsa.values.bitmap import num_words
from vsa.values.problem import Means, Task, Upstream


class Slot(IntEnum):
    """Tensors whose addresses a forward is given, in this order."""

    Q = 0
    K = auto()
    V = auto()
    GATE_FINE = auto()
    GATE_COARSE = auto()
    WORK = auto()
    OUT = auto()
    FINE = auto()
    KEPT = auto()
    LSE = auto()
    BITMAP = auto()
    COARSE = auto()
    MEANS = auto()


def can_prepare(task: Task) -> bool:
    """Whether all tensors are read where they are, without text."""
    from vsa import _C

    return (
        task.scale > 0
        and (task.runs == 1 or sub_blocks.is_scale(task.scale))
        and not task.grid.text
        and not task.kv_grid.text
        and len(task.counts) <= _C.MOST_HEAD_BUDGETS
        and all(is_addressable(x) for x in (task.q, task.k, task.v))
    )


class PreparedAttention:
    """See ``vsa.backends.base.Prepared``."""

    def __init__(self, machine: Machine, task: Task) -> None:
        from vsa import _C

        self.machine, self.device = machine, task.q.device
        has_coarse = task.gate_coarse is not None
        # What a backward needs of the coarse branch is kept, and the fine output before its gates.
        self.keeps_coarse = has_coarse and task.gradients
        self.keeps_fine = task.gradients and (has_coarse or task.gate_fine is not None)
        batch, length, heads, head_dim = task.q.shape
        kv_heads, tiles, key_tiles = task.k.shape[2], task.grid.num_tiles, task.kv_grid.num_tiles

        work, means, kept = Workspace(Slot.WORK), Workspace(Slot.MEANS), Workspace(Slot.KEPT)
        of_queries = batch, heads, tiles, head_dim
        of_keys = batch, kv_heads, key_tiles, head_dim
        shapes = (of_queries, of_keys, of_keys)[: 3 if has_coarse else 2]
        if task.runs > 1 and not has_coarse:
            shapes = ()
        at = means if self.keeps_coarse else work
        self.means = [at.part(shape, torch.float32) for shape in shapes]
        self.coarse = None
        if has_coarse:
            self.coarse = _result(work, Slot.COARSE, self.keeps_coarse, of_queries, torch.float32)
        matrices, rows = batch * kv_heads, heads // kv_heads * tiles
        numbers = score_numbers(matrices, rows, key_tiles, SCORE_BYTES)
        scores = work.part((numbers,), torch.float32)
        axes, counter = (kept.part(shape, torch.int32) for shape in ((batch, heads), (1,)))
        self.lse = _result(kept, Slot.LSE, task.gives_lse, (batch, heads, length), torch.float32)
        words = num_words(key_tiles)
        self.bitmap = _result(
            kept, Slot.BITMAP, task.gives_bitmap, (batch, heads, tiles, words), torch.int32
        )
        self.gives_lse, self.gives_bitmap = task.gives_lse, task.gives_bitmap
        self.kept_bytes, self.mean_numbers = kept.nbytes, means.nbytes // 4

        q, k, v = (
            placeholder(slot, x)
            for slot, x in ((Slot.Q, task.q), (Slot.K, task.k), (Slot.V, task.v))
        )
        grids = task.grid, task.kv_grid, task.kv_grid
        flat = beginning(self.bitmap, matrices * rows, words)
        calls: list[Any] = []
        if task.runs == 1:
            count = len(shapes)
            calls.append(means_call((q, k, v)[:count], grids[:count], self.means))
            of_q, of_k, *of_v = (as_matrices(mean, matrices) for mean in self.means)
            values = of_v[0] if of_v else None
            coarse = None if self.coarse is None else as_matrices(self.coarse, matrices)
            asked = Choice(of_q, of_k, values, task.scale, None, task.counts, task.mass, tiles)
            calls += choice_calls(asked, scores, flat, coarse, SCORE_BYTES)
        else:
            queries = sub_blocks.rows_of_queries(q, matrices, tiles, task.runs, work.part)
            keys = sub_blocks.rows_of_keys(k, key_tiles, task.runs, work.part)
            calls += self._by_sub_blocks(task, (q, k, v), (queries, keys), scores, flat)
        gates = LocatedGates(
            None if task.gate_fine is None else placeholder(Slot.GATE_FINE, task.gate_fine),
            None if task.gate_coarse is None else placeholder(Slot.GATE_COARSE, task.gate_coarse),
            self.coarse,
        )
        out, fine = (_contiguous(slot, task.q.shape, q.dtype) for slot in (Slot.OUT, Slot.FINE))
        calls.append(axis_call(self.bitmap, axes, task.grid.tiles, counter))
        calls.append(
            forward_call(
                Located3(q, q),
                Located3(k, k),
                Located3(v, v),
                Shared(grids[:2], task.scale, self.bitmap, axes, None, None),
                gates,
                out,
                fine if self.keeps_fine else None,
                self.lse,
                counter,
            )
        )
        self.work_bytes = work.nbytes
        self.program = _C.Program([call.step() for call in calls])
        self.gradients = (
            PreparedBackward(machine, task, self.lse, self.bitmap) if task.gradients else None
        )

    def _by_sub_blocks(
        self,
        task: Task,
        tensors: Sequence[Placeholder],
        rows: tuple[sub_blocks.Rows, sub_blocks.Rows],
        scores: Placeholder,
        bitmap: Located,
    ) -> Iterator[Any]:
        """Means, the choice by the means of runs, and the coarse attention."""
        grids = task.grid, task.kv_grid
        xs = tensors if self.means else tensors[:2]
        yield sub_blocks.run_means_call(xs, (*grids, task.kv_grid), rows, self.means, task.runs)
        asked = sub_blocks.RunChoice(
            *rows,
            task.kv_grid.num_tiles,
            sub_blocks.has_empty(grids, task.runs),
            task.scale,
            None,
            task.counts,
            task.mass,
            task.grid.num_tiles,
        )
        yield from sub_blocks.choice_calls(asked, scores, bitmap, SCORE_BYTES)
        if self.coarse is not None:
            matrices = rows[0].rows.shape[0]
            *of, coarse = (as_matrices(x, matrices) for x in (*self.means, self.coarse))
            yield from sub_blocks.coarse_calls(of, task.scale, scores, coarse, SCORE_BYTES)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate_fine: Tensor | None, gate_coarse: Tensor | None
    ) -> Forward:
        """See ``Prepared.forward``."""
        work = q.new_empty(self.work_bytes, dtype=torch.uint8)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        fine = torch.empty_like(out) if self.keeps_fine else out
        kept = q.new_empty(self.kept_bytes, dtype=torch.uint8)
        lse = q.new_empty(self.lse.shape, dtype=torch.float32) if self.gives_lse else None
        bitmap = q.new_empty(self.bitmap.shape, dtype=torch.int32) if self.gives_bitmap else None
        coarse = means = None
        if self.keeps_coarse and self.coarse is not None:
            coarse = q.new_empty(self.coarse.shape, dtype=torch.float32)
            means = q.new_empty(self.mean_numbers, dtype=torch.float32)
        tensors = q, k, v, gate_fine, gate_coarse, work, out, fine, kept, lse, bitmap, coarse, means
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        self.machine.run_program(self.program, addresses, self.device)
        return Forward(out, fine, kept, lse, bitmap, coarse, means)

    def backward(
        self, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """See ``Prepared.backward``."""
        assert self.gradients is not None
        return self.gradients(upstream, found, tensors)

    def unpacked(self, found: Forward) -> tuple[Tensor, Tensor, Means]:
        """See ``Prepared.unpacked``."""
        kept = found.kept.clone(memory_format=torch.contiguous_format)  # at an aligned address
        lse = part_of(kept, self.lse) if found.lse is None else found.lse
        bitmap = part_of(kept, self.bitmap) if found.bitmap is None else found.bitmap
        if found.means is None:
            return lse, bitmap, Means(None, None, None)
        means = found.means.contiguous()
        return lse, bitmap, Means(*(part_of(means, mean) for mean in self.means))


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
