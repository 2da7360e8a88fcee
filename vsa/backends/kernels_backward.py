# SPDX-License-Identifier: Apache-2.0
"""Gradients of the fine stage by the project's own kernels, gates included.

One pass over the tokens for what belongs to a query alone (and for the gates), one over the key
tiles for dK and dV, which walks the transposed selection, and one over the query tiles for dQ. In
between, with a coarse branch, its gradients on tile means, which the last two passes add to what
they store. What was saved is q, k, v, out, the log-sum-exp, the bitmap, and means if there were
any; there is no copy of tokens in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends import kernels
from vsa.backends.coarse_backward import coarse_attention_backward
from vsa.backends.layout import Plan
from vsa.values import bitmap
from vsa.values.grid import SLOTS


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention_backward``."""
    grads = gated_backward(
        grad_out, grad_lse, q, k, v, out, lse, words, text_valid, plan, kernels.Gates(), ()
    )
    return grads[0], grads[1], grads[2]


def gated_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    plan: Plan,
    gates: kernels.Gates,
    means: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the whole operation. The same bits every time: atomics add up nothing.

    Args:
        grad_out: gradient of the whole operation's output.
        grad_lse: of the log-sum-exp, or None for zero.
        q: as the forward was given, and so on up to ``plan``.
        k: likewise.
        v: likewise.
        out: the fine stage's part of the output.
        lse: its log-sum-exp.
        words: the selection.
        text_valid: which text tokens are real, or None.
        plan: of the call.
        gates: of the call.
        means: with a coarse gate, those of q, k and v, (B, heads, num_tiles, head_dim) fp32.

    Returns:
        dq, dk and dv, what comes through the means included; the gradients of both gates, of
        their types, None for those that are not there.
    """
    from vsa import _C

    sign, scale = kernels.positive_scale(plan.scale)
    q = q if sign == 1 else q * sign
    q, k, v, out = (kernels.addressable(x) for x in (q, k, v, out))
    gradient, lse = kernels.addressable(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    words = words.contiguous()
    transposed, counts = transpose(words, plan.kv_grid.num_tiles)
    query_axes = kernels.neighbour_axes(words, plan.grid.tiles, q.shape[2])
    key_axes = kernels.neighbour_axes(transposed, plan.kv_grid.tiles, k.shape[2])
    order = longest_first(counts, key_axes, kernels.text_tiles(plan.kv_grid), plan.kv_grid.tiles[0])
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    # What a fine gate makes of the gradient lies where dq will: the pass over query tiles, the last
    # that reads it, loads a tile of it before it stores that tile of dq.
    grad_out = gradient if gates.fine is None else grads[0]
    of_gates = [
        None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for gate in (gates.fine, gates.coarse)
    ]
    of_coarse = None if gates.coarse_rows is None else torch.empty_like(gates.coarse_rows)
    of_means = [torch.empty_like(mean) for mean in means]
    grad_means = [mean.data_ptr() for mean in of_means] or [0, 0, 0]
    query_tiles = plan.grid.num_tiles + kernels.text_tiles(plan.grid)
    row_stats = torch.empty(
        *q.shape[::2], query_tiles, 2, SLOTS, dtype=torch.float32, device=q.device
    )
    tile_counters = torch.empty(2, dtype=torch.int32, device=q.device)
    rows = kernels.rows_of_text(text_valid, q, plan)
    clean = [
        kernels.without_invalid_text(x, text_valid, grid)
        for x, grid in ((q, plan.grid), (k, plan.kv_grid), (v, plan.kv_grid))
    ]
    # With a fine gate the kernels write this gradient themselves, zeros included.
    clean.append(
        kernels.without_invalid_text(grad_out, text_valid, plan.grid)
        if gates.fine is None
        else grad_out
    )
    call = _C.FineBackward(
        problem=kernels.problem(q, k, words, query_axes, rows, scale, plan),
        q=kernels.views(q, clean[0], plan.grid),
        k=kernels.views(k, clean[1], plan.kv_grid),
        v=kernels.views(v, clean[2], plan.kv_grid),
        grad_fine=kernels.views(grad_out, clean[3], plan.grid),
        grad_q=kernels.views(grads[0], grads[0], plan.grid),
        grad_k=kernels.views(grads[1], grads[1], plan.kv_grid),
        grad_v=kernels.views(grads[2], grads[2], plan.kv_grid),
        fine_out=kernels.view(out),
        grad_out=kernels.view(gradient),
        gates=gates.addresses(),
        grad_fine_tokens=kernels.view(grad_out),
        grad_gate_fine=kernels.address(of_gates[0]),
        grad_gate_coarse=kernels.address(of_gates[1]),
        grad_coarse=kernels.address(of_coarse),
        grad_q_means=grad_means[0],
        grad_k_means=grad_means[1],
        grad_v_means=grad_means[2],
        transposed_bitmap=transposed.data_ptr(),
        key_axes=key_axes.data_ptr(),
        order=order.data_ptr(),
        lse=lse.data_ptr(),
        grad_lse=kernels.address(grad_lse),
        tile_counters=tile_counters.data_ptr(),
        row_stats=row_stats.data_ptr(),
    )
    kernels.run_by(call.launch_rows, call.emulate_rows, q.device)
    if of_coarse is not None and gates.coarse_rows is not None:
        coarse_attention_backward(of_coarse, gates.coarse_rows, means, plan.scale, of_means)
        if sign != 1:
            of_means[0] *= sign
    kernels.run(call, q.device)
    if sign != 1:
        grads[0] *= sign
    return grads[0], grads[1], grads[2], of_gates[0], of_gates[1]


def transpose(words: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Bitmaps with rows and columns exchanged.

    Args:
        words: (B, heads, rows, words of ``columns`` bits) int32, contiguous.
        columns: bits of a row.

    Returns:
        (B, heads, columns, words of ``rows`` bits) int32, and how many bits each of its rows has,
        (B, heads, columns) int32.
    """
    from vsa import _C

    batch, heads, rows, _ = words.shape
    target = words.new_empty(batch, heads, columns, bitmap.num_words(rows))
    counts = words.new_empty(batch, heads, columns)
    call = _C.BitmapTranspose(
        source=words.data_ptr(),
        target=target.data_ptr(),
        counts=counts.data_ptr(),
        bitmaps=batch * heads,
        rows=rows,
        columns=columns,
    )
    kernels.run(call, words.device)
    return target, counts


def longest_first(counts: Tensor, axes: Tensor, text_tiles: int, layers: int) -> Tensor:
    """In which order the groups of neighbouring key tiles are worked on, within each key head.

    Args:
        counts: (B, heads, n_k) int32, query tiles that attend each key tile; contiguous.
        axes: (B, kv_heads) int32, along which key tiles are neighbours; contiguous.
        text_tiles: tiles of the keys' text, which come first in the numbering of groups.
        layers: tiles of the keys' video along t.

    Returns:
        (B, kv_heads, groups) int32, by their longest column, equal ones as they come; first those
        that begin with text, which everyone attends.
    """
    from vsa import _C

    batch, heads, columns = counts.shape
    kv_heads = axes.shape[1]
    groups = -(-(text_tiles + columns) // _C.KEY_TILES_PER_GROUP)
    order = counts.new_empty(batch, kv_heads, groups)
    call = _C.ColumnOrder(
        counts=counts.data_ptr(),
        axes=axes.data_ptr(),
        order=order.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        columns=columns,
        text_tiles=text_tiles,
        layers=layers,
    )
    kernels.run(call, counts.device)
    return order
