# SPDX-License-Identifier: Apache-2.0
"""The backward of a prepared call of attention: one crossing into C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum, auto

import torch
from torch import Tensor

from vsa.backends.base import Forward
from vsa.backends.kernels.calls import (
    Gradients,
    Located3,
    LocatedGates,
    Order,
    Shared,
    axis_call,
    backward_call,
    groups_of,
    sort_call,
    transpose_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.passes import may_take_one, must_repeat, sums_shape
from vsa.backends.kernels.placeholder import Placeholder, Workspace, contiguous_strides
from vsa.backends.kernels.prepared_coarse import CoarseBackward, mean_shapes
from vsa.backends.kernels.prepared_padded import Kept, PaddedCalls
from vsa.backends.kernels.tail_calls import round_call, sums_call, tail_tensors
from vsa.backends.kernels.tensors import text_tiles
from vsa.backends.kernels.text import text_of
from vsa.values.bitmap import num_words
from vsa.values.grid import SLOTS
from vsa.values.problem import Upstream
from vsa.values.task import Task


class Slot(IntEnum):
    """Tensors whose addresses a backward is given, in this order."""

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
    FINE = auto()
    KEPT = auto()
    LSE = auto()
    BITMAP = auto()
    COARSE = auto()
    GRAD_OUT = auto()
    GRAD_LSE = auto()
    GRAD_Q = auto()
    GRAD_K = auto()
    GRAD_V = auto()
    GRAD_GATE_FINE = auto()
    GRAD_GATE_COARSE = auto()
    MEANS = auto()
    SUMS = auto()
    WORK = auto()


class PreparedBackward:
    """See ``vsa.backends.base.Prepared.backward``."""

    def __init__(
        self, machine: Machine, task: Task, lse: Placeholder, bitmap: Placeholder, padded: Kept
    ) -> None:
        """Where the forward leaves ``lse`` and ``bitmap``: in what it keeps, or apart, or given."""
        from vsa import _C

        self.machine, self.device = machine, task.q.device
        batch, length, heads, head_dim = task.q.shape
        kv_heads, tiles, key_tiles = task.k.shape[2], task.grid.num_tiles, task.kv_grid.num_tiles
        dtype = task.q.dtype

        def whole(slot: int, shape: Sequence[int], dtype: torch.dtype) -> Placeholder:
            return Placeholder(slot, tuple(shape), contiguous_strides(shape), dtype)

        def given(slot: int, x: Tensor) -> Placeholder:
            return Placeholder(slot, tuple(x.shape), x.stride(), x.dtype)

        work = Workspace(Slot.WORK)
        transposed = work.part((batch, heads, key_tiles, num_words(tiles)), torch.int32)
        counts = work.part((batch, heads, key_tiles), torch.int32)
        query_axes = work.part((batch, heads), torch.int32)
        key_axes = work.part((batch, kv_heads), torch.int32)
        key_text = text_tiles(task.kv_grid)
        together = _C.KEY_TILES_PER_GROUP
        groups = groups_of(key_text + key_tiles, together)
        query_tiles = tiles + text_tiles(task.grid)
        row_stats = work.part((batch, heads, query_tiles, 2, SLOTS), torch.float32)
        # A run that has no address for it, where bits have to repeat, takes two passes.
        self.sums: Placeholder | None = None
        if may_take_one(head_dim, (task.grid, task.kv_grid), padded=task.padded is not None):
            self.sums = whole(Slot.SUMS, sums_shape(batch, heads, task.grid), torch.float32)
        counters = work.part((4,), torch.int32)
        key_order = Order(work.part((batch, kv_heads, groups), torch.int32), counters[2:3])
        here = Kept(*(None if x is None else replace(x, slot=Slot.KEPT) for x in padded))
        of_padded = PaddedCalls(task, here, lambda name: Slot[name])
        queries = of_padded.order(
            query_axes, _C.backward_query_tiles_per_group(head_dim), work, counters[3:]
        )
        # The kernels write gradients of gates token by token.
        self.clears_gates = task.padded is not None
        coarse = None
        if task.gate_coarse is not None:
            left = Workspace(Slot.COARSE), Workspace(Slot.MEANS)
            coarse = CoarseBackward(task, *left, work, of_padded.sizes)

        q, k, v = given(Slot.Q, task.q), given(Slot.K, task.k), given(Slot.V, task.v)
        # The same parts in the slots of a backward.
        lse = replace(lse, slot=Slot.LSE if task.gives_lse else Slot.KEPT)
        if task.bitmap is None:
            bitmap = replace(bitmap, slot=Slot.BITMAP if task.gives_bitmap else Slot.KEPT)
        # What a fine gate makes of the gradient lies where dq will: the last pass that reads a tile
        # of it is the one that stores that tile of dq.
        of_fine = whole(
            Slot.GRAD_OUT if task.gate_fine is None else Slot.GRAD_Q, task.q.shape, dtype
        )
        grad_means: list[Placeholder | None] = [None, None, None]
        if coarse is not None:
            grad_means = list(coarse.grad_means)
        if task.tail:
            shapes = mean_shapes(task)
            if coarse is None:
                grad_means[1:] = (work.part(shape, torch.float32) for shape in shapes[1:])
            if task.gate_fine is not None:  # a tail reads it after the fine stage's dq is stored
                of_fine = work.part(task.q.shape, dtype)
        multiplied = [(q, task.grid), (k, task.kv_grid), (v, task.kv_grid)]
        if task.gate_fine is None:
            multiplied.append((of_fine, task.grid))
        valid = None if task.text_valid is None else given(Slot.TEXT_VALID, task.text_valid)
        grids = task.grid, task.kv_grid
        text = text_of(valid, batch, head_dim, grids, multiplied, work.part)
        # With a fine gate the kernels write this gradient themselves, zeros included.
        clean = [*text.clean, Located3(of_fine, of_fine)]
        lse_shape = batch, heads, length
        call = backward_call(
            clean[0],
            clean[1],
            clean[2],
            Shared(
                grids,
                task.scale,
                bitmap,
                query_axes,
                text.query_rows,
                text.key_rows,
                of_padded.sizes,
            ),
            LocatedGates(
                None if task.gate_fine is None else given(Slot.GATE_FINE, task.gate_fine),
                None if task.gate_coarse is None else given(Slot.GATE_COARSE, task.gate_coarse),
                None if coarse is None else coarse.out,
            ),
            Gradients(
                fine_out=whole(Slot.FINE, task.q.shape, dtype),
                grad_out=whole(Slot.GRAD_OUT, task.q.shape, dtype),
                grad_fine=clean[3],
                grad_q=whole(Slot.GRAD_Q, task.q.shape, dtype),
                grad_k=whole(Slot.GRAD_K, task.k.shape, dtype),
                grad_v=whole(Slot.GRAD_V, task.v.shape, dtype),
                grad_gate_fine=None
                if task.gate_fine is None
                else whole(Slot.GRAD_GATE_FINE, task.q.shape, task.gate_fine.dtype),
                grad_gate_coarse=None
                if task.gate_coarse is None
                else whole(Slot.GRAD_GATE_COARSE, task.q.shape, task.gate_coarse.dtype),
                grad_coarse=None if coarse is None else coarse.grad,
                grad_means=grad_means,
                transposed=transposed,
                key_axes=key_axes,
                key_order=key_order,
                query_order=queries.order,
                lse=lse,
                grad_lse=whole(Slot.GRAD_LSE, lse_shape, torch.float32),
                tile_counters=counters[:2],
                row_stats=row_stats,
                grad_q_sums=self.sums,
            ),
        )
        steps = [
            *(each.step() for each in text.calls),
            transpose_call(bitmap, key_tiles, transposed, counts).step(),
            axis_call(bitmap, query_axes, task.grid.tiles, counters).step(),
            axis_call(transposed, key_axes, task.kv_grid.tiles).step(),
            sort_call(
                counts, key_axes, key_order, key_text, task.kv_grid.tiles[0], together
            ).step(),
            *(each.step() for each in queries.calls),
            call.step_rows(),
        ]
        if coarse is not None:
            steps += [each.step() for each in coarse.calls(task.scale)]
        if task.tail:
            kept = Workspace(Slot.MEANS)  # as the forward laid them out
            _, k_means, v_means = (kept.part(shape, torch.float32) for shape in shapes)
            rounded = tail_tensors(batch, kv_heads, task.kv_grid, head_dim, dtype, work.part)
            added = coarse is not None
            tail = sums_call(call, q, k, grids, rounded, grad_means[1:], added, work.part).call
            steps += [
                round_call(k_means, v_means, rounded, task.kv_grid).step(),
                tail.step_means(),
                call.step(),
                tail.step(),
            ]
        else:
            steps.append(call.step())
        self.work_bytes = work.nbytes
        self.program = _C.Program(steps)

    def __call__(
        self, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the first of ``tensors``: q, k, v and both gates."""
        grads = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in tensors[:5]
        ]
        if self.clears_gates:
            for grad in grads[3:]:
                if grad is not None:
                    grad.zero_()
        work = found.kept.new_empty(self.work_bytes)
        sums = None
        if self.sums is not None and not must_repeat():
            sums = torch.empty(self.sums.shape, dtype=torch.float32, device=self.device)
        addresses = [
            *(0 if x is None else x.data_ptr() for x in tensors),
            found.fine.data_ptr(),
            found.kept.data_ptr(),
            0 if found.lse is None else found.lse.data_ptr(),
            0 if found.bitmap is None else found.bitmap.data_ptr(),
            0 if found.coarse is None else found.coarse.data_ptr(),
            upstream.grad_out.data_ptr(),
            0 if upstream.grad_lse is None else upstream.grad_lse.data_ptr(),
            *(0 if x is None else x.data_ptr() for x in grads),
            0 if found.means is None else found.means.data_ptr(),
            0 if sums is None else sums.data_ptr(),
            work.data_ptr(),
        ]
        self.machine.run_program(self.program, addresses, self.device)
        return grads
