# SPDX-License-Identifier: Apache-2.0
"""A whole call of attention, prepared once: then a run allocates, fills in addresses, launches.

The calls are those that run one by one elsewhere, built from placeholders instead of tensors, so
that both paths launch the same kernels with the same numbers and give the same bits. Products of
small matrices are PyTorch's, so a forward crosses into C++ before and after the scores, and once
more after the coarse attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, auto

import torch
from torch import Tensor

from vsa.backends.base import Forward
from vsa.backends.kernels.calls import (
    Located3,
    LocatedGates,
    Shared,
    axis_call,
    combine_call,
    forward_call,
    means_call,
    select_call,
    split_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.placeholder import Placeholder, Workspace, contiguous_strides
from vsa.backends.kernels.prepared_backward import PreparedBackward
from vsa.backends.kernels.tensors import is_addressable
from vsa.backends.torch_coarse import SCORE_BYTES, full_precision
from vsa.values.bitmap import num_words
from vsa.values.problem import Means, Task, Upstream


class Slot(IntEnum):
    """Tensors whose addresses a forward is given, in this order."""

    Q = 0
    K = auto()
    V = auto()
    GATE_FINE = auto()
    GATE_COARSE = auto()
    OUT = auto()
    FINE = auto()
    LSE = auto()
    BITMAP = auto()
    WORK = auto()
    MEANS = auto()
    SCORES = auto()
    COARSE = auto()


def can_prepare(task: Task) -> bool:
    """Whether all tensors are read where they are, without text, with scores in one piece."""
    from vsa import _C

    score_bytes = 4 * task.q.shape[0] * task.q.shape[2] * task.grid.num_tiles
    return (
        task.scale > 0
        and not task.grid.text
        and not task.kv_grid.text
        and len(task.counts) <= _C.MOST_HEAD_BUDGETS
        and all(is_addressable(x) for x in (task.q, task.k, task.v))
        and score_bytes * task.kv_grid.num_tiles <= SCORE_BYTES
    )


class PreparedAttention:
    """See ``vsa.backends.base.Prepared``."""

    def __init__(self, machine: Machine, task: Task) -> None:
        from vsa import _C

        self.machine, self.device = machine, task.q.device
        self.gated = task.gate_fine is not None or task.gate_coarse is not None
        self.has_coarse, self.keeps_fine = task.gate_coarse is not None, task.gradients
        batch, length, heads, head_dim = task.q.shape
        kv_heads, tiles, key_tiles = task.k.shape[2], task.grid.num_tiles, task.kv_grid.num_tiles
        self.lse_shape = batch, heads, length
        self.bitmap_shape = batch, heads, tiles, num_words(key_tiles)
        # Query heads that share a key head are rows of one matrix.
        self.matrices, self.rows, self.columns = (
            batch * kv_heads,
            heads // kv_heads * tiles,
            key_tiles,
        )
        self.depth = _C.SPLIT_PIECES * head_dim

        work, kept = Workspace(Slot.WORK), Workspace(Slot.MEANS)
        at = kept if self.has_coarse else work  # a backward needs them
        shapes = [(batch, heads, tiles, head_dim), (batch, kv_heads, key_tiles, head_dim)]
        shapes += shapes[1:] * self.has_coarse
        self.means = [at.part(shape, torch.float32) for shape in shapes]
        self.pieces = [
            work.part((self.matrices, count, self.depth), torch.bfloat16)
            for count in (self.rows, self.columns)
        ]
        axes, counter = (work.part(shape, torch.int32) for shape in ((batch, heads), (1,)))
        self.work_numbers, self.mean_numbers = work.nbytes // 2, kept.nbytes // 4

        q, k, v = (
            placeholder(slot, x)
            for slot, x in ((Slot.Q, task.q), (Slot.K, task.k), (Slot.V, task.v))
        )
        out, fine = (_contiguous(slot, task.q.shape, q.dtype) for slot in (Slot.OUT, Slot.FINE))
        lse = _contiguous(Slot.LSE, self.lse_shape, torch.float32)
        bitmap = _contiguous(Slot.BITMAP, self.bitmap_shape, torch.int32)
        scores = _contiguous(Slot.SCORES, (self.matrices * self.rows, self.columns), torch.float32)
        gates = LocatedGates(
            None if task.gate_fine is None else placeholder(Slot.GATE_FINE, task.gate_fine),
            None if task.gate_coarse is None else placeholder(Slot.GATE_COARSE, task.gate_coarse),
            _contiguous(Slot.COARSE, shapes[0], torch.float32) if self.has_coarse else None,
        )
        operands = [
            Placeholder(mean.slot, shape, contiguous_strides(shape), mean.dtype, mean.offset)
            for mean, shape in zip(
                self.means,
                ((self.matrices, self.rows, head_dim), (self.matrices, self.columns, head_dim)),
                strict=False,
            )
        ]
        self.before_scores = _C.Program(
            [
                means_call(
                    (q, k, v)[: len(self.means)],
                    (task.grid, task.kv_grid, task.kv_grid)[: len(self.means)],
                    self.means,
                ).step(),
                split_call(operands[0], operands[1], self.pieces, task.scale).step(),
            ]
        )
        select = select_call(
            scores,
            None,
            task.counts,
            task.mass,
            tiles,
            0,
            bitmap,
            scores if self.has_coarse else None,
        ).step()
        shared = Shared((task.grid, task.kv_grid), task.scale, bitmap, axes, None, None)
        apart = self.gated and self.keeps_fine
        attend = [
            axis_call(bitmap, axes, task.grid.tiles).step(),
            forward_call(
                Located3(q, q),
                Located3(k, k),
                Located3(v, v),
                shared,
                LocatedGates() if apart else gates,
                fine if apart else out,
                lse,
                counter,
            ).step(),
        ]
        if apart:
            attend.append(combine_call(fine, out, gates, task.grid).step())
        self.after_scores = _C.Program([select] if self.has_coarse else [select, *attend])
        self.after_coarse = _C.Program(attend)
        self.gradients = PreparedBackward(machine, task) if task.gradients else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate_fine: Tensor | None, gate_coarse: Tensor | None
    ) -> Forward:
        """See ``Prepared.forward``."""
        device = self.device
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        fine = torch.empty_like(out) if self.gated and self.keeps_fine else out
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=device)
        bitmap = torch.empty(self.bitmap_shape, dtype=torch.int32, device=device)
        work = torch.empty(self.work_numbers, dtype=torch.bfloat16, device=device)
        means = None
        if self.has_coarse:
            means = torch.empty(self.mean_numbers, dtype=torch.float32, device=device)
        addresses = [
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if gate_fine is None else gate_fine.data_ptr(),
            0 if gate_coarse is None else gate_coarse.data_ptr(),
            out.data_ptr(),
            fine.data_ptr(),
            lse.data_ptr(),
            bitmap.data_ptr(),
            work.data_ptr(),
            0 if means is None else means.data_ptr(),
            0,
            0,
        ]
        run = self.machine.run_program
        run(self.before_scores, addresses, device)
        left, right = (_part(work, piece) for piece in self.pieces)
        scores = self.machine.product(left, right)
        addresses[Slot.SCORES] = scores.data_ptr()
        run(self.after_scores, addresses, device)
        if means is None:
            return Forward(out, lse, bitmap, fine, None, NO_MEANS)
        of_tiles = [_part(means, mean) for mean in self.means]
        with full_precision(device):
            coarse = torch.bmm(
                scores.view(self.matrices, self.rows, self.columns), of_tiles[2].flatten(0, 1)
            )
        addresses[Slot.COARSE] = coarse.data_ptr()
        run(self.after_coarse, addresses, device)
        coarse = coarse.view(self.means[0].shape)
        return Forward(out, lse, bitmap, fine, coarse, Means(*of_tiles))

    def backward(
        self, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """See ``Prepared.backward``."""
        assert self.gradients is not None
        return self.gradients(upstream, found, tensors)


NO_MEANS = Means(None, None, None)


def placeholder(slot: int, x: Tensor) -> Placeholder:
    """For a tensor (B, S, heads, head_dim) of a task."""
    return Placeholder(slot, tuple(x.shape), x.stride(), x.dtype)


def _contiguous(slot: int, shape: Sequence[int], dtype: torch.dtype) -> Placeholder:
    return Placeholder(slot, tuple(shape), contiguous_strides(shape), dtype)


def _part(memory: Tensor, part: Placeholder) -> Tensor:
    """A part of a workspace of its own type."""
    return memory.as_strided(part.shape, part.strides, part.offset // memory.element_size())
