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
    forward_call,
    means_call,
    select_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.placeholder import (
    Placeholder,
    Workspace,
    contiguous_strides,
    part_of,
)
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
    MEANS = auto()
    OPERANDS = auto()
    SCORES = auto()
    OUT = auto()
    FINE = auto()
    KEPT = auto()
    LSE = auto()
    BITMAP = auto()
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
        # Query heads that share a key head are rows of one matrix.
        self.matrices, self.rows = batch * kv_heads, heads // kv_heads * tiles
        self.columns = key_tiles
        depth = _C.SPLIT_PIECES * head_dim

        # Operands are needed for the scores alone; means with a coarse gate by a backward too.
        operands, means = Workspace(Slot.OPERANDS), Workspace(Slot.MEANS)
        kept = Workspace(Slot.KEPT)
        self.pieces = [
            operands.part((self.matrices, count, depth), torch.bfloat16)
            for count in (self.rows, self.columns)
        ]
        shapes = [(batch, heads, tiles, head_dim), (batch, kv_heads, key_tiles, head_dim)]
        shapes += shapes[1:] * self.has_coarse
        at = means if self.has_coarse else operands
        self.means = [at.part(shape, torch.float32) for shape in shapes]
        axes, counter = (kept.part(shape, torch.int32) for shape in ((batch, heads), (1,)))
        self.lse = _result(kept, Slot.LSE, task.gives_lse, (batch, heads, length), torch.float32)
        words = num_words(key_tiles)
        self.bitmap = _result(
            kept, Slot.BITMAP, task.gives_bitmap, (batch, heads, tiles, words), torch.int32
        )
        self.gives_lse, self.gives_bitmap = task.gives_lse, task.gives_bitmap
        self.operand_numbers, self.mean_numbers = operands.nbytes // 2, means.nbytes // 4
        self.kept_bytes = kept.nbytes

        q, k, v = (
            placeholder(slot, x)
            for slot, x in ((Slot.Q, task.q), (Slot.K, task.k), (Slot.V, task.v))
        )
        out, fine = (_contiguous(slot, task.q.shape, q.dtype) for slot in (Slot.OUT, Slot.FINE))
        scores = _contiguous(Slot.SCORES, (self.matrices * self.rows, self.columns), torch.float32)
        gates = LocatedGates(
            None if task.gate_fine is None else placeholder(Slot.GATE_FINE, task.gate_fine),
            None if task.gate_coarse is None else placeholder(Slot.GATE_COARSE, task.gate_coarse),
            _contiguous(Slot.COARSE, shapes[0], torch.float32) if self.has_coarse else None,
        )
        count = len(self.means)
        self.before_scores = _C.Program(
            [
                means_call(
                    (q, k, v)[:count],
                    (task.grid, task.kv_grid, task.kv_grid)[:count],
                    self.means,
                    (*self.pieces, None),
                    task.scale,
                ).step()
            ]
        )
        select = select_call(
            scores,
            None,
            task.counts,
            task.mass,
            tiles,
            0,
            self.bitmap,
            scores if self.has_coarse else None,
        ).step()
        shared = Shared((task.grid, task.kv_grid), task.scale, self.bitmap, axes, None, None)
        attend = [
            axis_call(self.bitmap, axes, task.grid.tiles, counter).step(),
            forward_call(
                Located3(q, q),
                Located3(k, k),
                Located3(v, v),
                shared,
                gates,
                out,
                fine if self.gated and self.keeps_fine else None,
                self.lse,
                counter,
            ).step(),
        ]
        self.after_scores = _C.Program([select] if self.has_coarse else [select, *attend])
        self.after_coarse = _C.Program(attend)
        self.gradients = (
            PreparedBackward(machine, task, self.lse, self.bitmap) if task.gradients else None
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate_fine: Tensor | None, gate_coarse: Tensor | None
    ) -> Forward:
        """See ``Prepared.forward``."""
        device, run = self.device, self.machine.run_program
        means = None
        if self.has_coarse:
            means = q.new_empty(self.mean_numbers, dtype=torch.float32)
        operands = q.new_empty(self.operand_numbers, dtype=torch.bfloat16)
        addresses = [
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if gate_fine is None else gate_fine.data_ptr(),
            0 if gate_coarse is None else gate_coarse.data_ptr(),
            0 if means is None else means.data_ptr(),
            operands.data_ptr(),
        ]
        run(self.before_scores, addresses, device)
        left, right = (part_of(operands, piece) for piece in self.pieces)
        scores = self.machine.product(left, right)
        del operands, left, right

        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        fine = torch.empty_like(out) if self.gated and self.keeps_fine else out
        kept = q.new_empty(self.kept_bytes, dtype=torch.uint8)
        lse = q.new_empty(self.lse.shape, dtype=torch.float32) if self.gives_lse else None
        bitmap = q.new_empty(self.bitmap.shape, dtype=torch.int32) if self.gives_bitmap else None
        addresses += [
            scores.data_ptr(),
            out.data_ptr(),
            fine.data_ptr(),
            kept.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if bitmap is None else bitmap.data_ptr(),
            0,
        ]
        run(self.after_scores, addresses, device)
        if means is None:
            return Forward(out, fine, kept, lse, bitmap, None, None)
        with full_precision(device):
            coarse = torch.bmm(
                scores.view(self.matrices, self.rows, self.columns),
                part_of(means, self.means[2]).flatten(0, 1),
            ).view(self.means[0].shape)
        del scores
        addresses[Slot.COARSE] = coarse.data_ptr()
        run(self.after_coarse, addresses, device)
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
