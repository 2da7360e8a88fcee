# SPDX-License-Identifier: Apache-2.0
"""Gradients of the fine stage by the project's own kernels, gates included.

One pass over the tokens for what belongs to a query alone (and for the gates), one over the key
tiles for dK and dV, which walks the transposed selection, and one over the query tiles for dQ. In
between, with a coarse branch, its gradients on tile means, which the last two passes add to what
they store. Instead of the last two, most calls of 64 channels take one pass over the key tiles,
which adds up dQ as well, in fp32 (passes.py). What was saved is q, k, v, out, the log-sum-exp, the
bitmap, and means if there were any; there is no other copy of tokens in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsa.backends.kernels.calls import (
    AS_THEY_COME,
    Gradients,
    Located3,
    LocatedGates,
    Order,
    Shared,
    backward_call,
    groups_of,
    sort_call,
    transpose_call,
)
from vsa.backends.kernels.coarse_backward import (
    coarse_attention_backward,
    without_empty_backward,
)
from vsa.backends.kernels.forward import (
    contiguous_like,
    neighbour_axes,
    new_on,
    positive_scale,
    whole_numbers,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.masked_calls import outside_tail
from vsa.backends.kernels.passes import may_take_one, must_repeat, sums_shape
from vsa.backends.kernels.tail_calls import sums_call
from vsa.backends.kernels.tail_forward import rounded
from vsa.backends.kernels.tensors import addressable, text_tiles
from vsa.backends.kernels.text import text_of
from vsa.values.bitmap import num_words
from vsa.values.grid import SLOTS
from vsa.values.problem import FineProblem, Gates, Means, Saved, TailMeans, Upstream

if TYPE_CHECKING:
    from vsa import _C


def backward(
    machine: Machine,
    upstream: Upstream,
    saved: Saved,
    problem: FineProblem,
    means: Means,
    gates: Gates,
    tail: TailMeans | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the whole operation.

    The same bits every time in two passes; one pass adds up dq in any order.

    Args:
        machine: what runs the kernels.
        upstream: gradients of the whole operation's output and of the log-sum-exp.
        saved: by the forward.
        problem: as the forward was given.
        means: as the forward was given.
        gates: as the forward was given.
        tail: as the forward was given; ``saved`` and the gradients upstream are then those of the
            whole softmax.

    Returns:
        dq, dk and dv, what comes through the means included; the gradients of both gates, of
        their types, None for those that are not there.
    """
    grid, kv_grid = grids = problem.grids
    # Hooks of autograd may have laid out anew what was saved.
    means = Means(*map(_contiguous, means))
    gates = gates._replace(coarse=_contiguous(gates.coarse))
    sign, scale = positive_scale(problem.scale)
    q = problem.q if sign == 1 else problem.q * sign
    q, k, v, out = (addressable(x) for x in (q, problem.k, problem.v, saved.out))
    gradient, lse = addressable(upstream.grad_out), saved.lse.contiguous()
    grad_lse = None if upstream.grad_lse is None else upstream.grad_lse.float().contiguous()
    bitmap = problem.bitmap.contiguous()
    transposed, counts = transpose(machine, bitmap, kv_grid.num_tiles)
    counters = torch.empty(3, dtype=torch.int32, device=q.device)
    tile_counters, long_keys = counters[:2], counters[2:]
    query_axes = neighbour_axes(machine, bitmap, grid.tiles, q.shape[2], counters)
    key_axes = neighbour_axes(machine, transposed, kv_grid.tiles, k.shape[2])
    key_order = longest_first(
        machine, counts, key_axes, text_tiles(kv_grid), kv_grid.tiles[0], long_keys
    )
    padded = problem.tile_sizes[0] is not None
    sums = None
    if may_take_one(q.shape[3], grids, padded) and not must_repeat():
        shape = sums_shape(q.shape[0], q.shape[2], grid)
        sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    grads = [contiguous_like(x) for x in (q, k, v)]
    # What a fine gate makes of the gradient lies where dq will: the pass over query tiles, the last
    # that reads it, loads a tile of it before it stores that tile of dq, and after one pass dq is
    # stored when all is read. That of a tail is later.
    of_fine = gradient
    if gates.gate_fine is not None:
        of_fine = grads[0] if tail is None else torch.empty_like(grads[0])
    of_gates = [
        None if gate is None else _of_gate(problem, gate)
        for gate in (gates.gate_fine, gates.gate_coarse)
    ]
    of_coarse = None if gates.coarse is None else torch.empty_like(gates.coarse)
    of_means = [None if mean is None else torch.empty_like(mean) for mean in means]
    if tail is not None and of_coarse is None:
        of_means[1:] = (torch.empty_like(mean) for mean in tail)
    query_tiles = grid.num_tiles + text_tiles(grid)
    row_stats = torch.empty(
        *q.shape[::2], query_tiles, 2, SLOTS, dtype=torch.float32, device=q.device
    )
    multiplied = [(q, grid), (k, kv_grid), (v, kv_grid)]
    if gates.gate_fine is None:
        multiplied.append((of_fine, grid))
    valid = problem.text_valid
    text = text_of(valid, q.shape[0], q.shape[3], grids, multiplied, new_on(q.device))
    for each in text.calls:
        machine.run(each, q.device)
    # With a fine gate the kernels write this gradient themselves, zeros included.
    clean = [*text.clean, Located3(of_fine, of_fine)]

    def backward_of(bits: Tensor) -> _C.FineBackward:
        shared = Shared(
            grids,
            scale,
            bits,
            query_axes,
            text.query_rows,
            text.key_rows,
            whole_numbers(problem),
        )
        gradients = Gradients(
            fine_out=out,
            grad_out=gradient,
            grad_fine=clean[3],
            grad_q=grads[0],
            grad_k=grads[1],
            grad_v=grads[2],
            grad_gate_fine=of_gates[0],
            grad_gate_coarse=of_gates[1],
            grad_coarse=of_coarse,
            grad_means=of_means,
            transposed=transposed,
            key_axes=key_axes,
            key_order=key_order,
            query_order=AS_THEY_COME,
            lse=lse,
            grad_lse=grad_lse,
            tile_counters=tile_counters,
            row_stats=row_stats,
            grad_q_sums=sums,
        )
        return backward_call(clean[0], clean[1], clean[2], shared, LocatedGates(*gates), gradients)

    call = backward_of(bitmap)
    machine.run_rows(call, q.device)
    of_forward = [mean for mean in means if mean is not None]
    if of_coarse is not None and gates.coarse is not None:
        of_all = [grad for grad in of_means if grad is not None]
        coarse_backward = (
            partial(coarse_attention_backward, mask=problem.mask)
            if problem.tile_sizes[1] is None
            else partial(without_empty_backward, problem.tile_sizes[1])
        )
        coarse_backward(machine, of_coarse, gates.coarse, of_forward, problem.scale, of_all)
        if sign != 1:
            of_all[0] *= sign
    of_tail = None
    if tail is not None:
        kept = rounded(machine, tail, kv_grid, q.dtype, problem.mask)
        outside = outside_tail(bitmap, problem.mask, grid.num_tiles, kv_grid.num_tiles)
        tail_call = call if problem.mask is None else backward_of(outside)
        of_tail = sums_call(
            tail_call, q, k, (grid, kv_grid), kept, of_means[1:], of_coarse is not None
        )
        machine.run_means(of_tail.call, q.device)
    machine.run(call, q.device)
    if of_tail is not None:
        machine.run(of_tail.call, q.device)
    if sign != 1:
        grads[0] *= sign
    return grads[0], grads[1], grads[2], of_gates[0], of_gates[1]


def _of_gate(problem: FineProblem, gate: Tensor) -> Tensor:
    """Where a gate's gradient is written, token by token: what is never written holds zeros."""
    grad = contiguous_like(gate)
    return grad if problem.tile_sizes[0] is None else grad.zero_()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def transpose(machine: Machine, bitmap: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Bitmaps with rows and columns exchanged.

    Args:
        machine: what runs the kernel.
        bitmap: (B, heads, rows, words of ``columns`` bits) int32, contiguous.
        columns: bits of a row.

    Returns:
        (B, heads, columns, words of ``rows`` bits) int32, and how many bits each of its rows has,
        (B, heads, columns) int32.
    """
    batch, heads, rows, _ = bitmap.shape
    target = bitmap.new_empty(batch, heads, columns, num_words(rows))
    counts = bitmap.new_empty(batch, heads, columns)
    machine.run(transpose_call(bitmap, columns, target, counts), bitmap.device)
    return target, counts


def longest_first(
    machine: Machine,
    counts: Tensor,
    axes: Tensor,
    text_tiles: int,
    layers: int,
    long_ones: Tensor,
) -> Order:
    """In which order the groups of neighbouring key tiles are worked on.

    Args:
        machine: what runs the kernel.
        counts: (B, heads, n_k) int32, query tiles that attend each key tile; contiguous.
        axes: (B, kv_heads) int32, along which key tiles are neighbours; contiguous.
        text_tiles: tiles of the keys' text, which come first in the numbering of groups.
        layers: tiles of the keys' video along t.
        long_ones: (1,) int32, zero, where their number is written.

    Returns:
        (B, kv_heads, groups) int32, by their longest column, equal ones as they come; first those
        that begin with text, which everyone attends.
    """
    from vsa import _C

    batch, _, columns = counts.shape
    kv_heads = axes.shape[1]
    together = _C.KEY_TILES_PER_GROUP
    groups = groups_of(text_tiles + columns, together)
    order = Order(counts.new_empty(batch, kv_heads, groups), long_ones)
    machine.run(sort_call(counts, axes, order, text_tiles, layers, together), counts.device)
    return order
