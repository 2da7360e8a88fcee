# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention as a whole: grid, coarse, select, fine, combine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsa.stages import inputs
from vsa.stages.coarse import tile_means
from vsa.stages.combine import gated_attention, is_one_operator
from vsa.stages.select import (
    Selection,
    everything,
    select_and_attend,
    select_outside,
    select_tiles,
)
from vsa.values import checks
from vsa.values.budget import TopK, resolve
from vsa.values.grid import Extent, Grid


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    grid: Extent | Grid | None = None,
    kv_grid: Extent | Grid | None = None,
    tile: inputs.Tile = inputs.DEFAULT_TILE,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    selection: Selection | None = None,
    text_valid: Tensor | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Video Sparse Attention (Zhang et al., 2025, section 2.2).

    Differentiable in q, k, v and the gates.

    Args:
        q: (B, T, H, W, heads, head_dim), or flat (B, S, heads, head_dim) in raster order (w
            fastest); bf16, fp16, fp32 or fp64; contiguous last dimension, any other strides.
        k: likewise with the keys' grid; its heads divide those of q.
        v: like k.
        topk: key tiles per query tile: an int (clamped to their number); a float in (0, 1], their
            share, ceil(topk * n), at least 1; a tuple with one of these for each query head; a
            tensor () of one of these on the CPU; or a ``vsa.TopP``, as many as hold a share of the
            softmax. None only beside ``selection``. Numbers that vary do not compile code again.
        grid: (T, H, W) or ``vsa.Grid`` of the queries; None takes it from a video-shaped q, or cuts
            a flat one into runs of 64 tokens.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w), at most 64 in all; "auto" wastes the fewest slots on
            this grid.
        gate_coarse: broadcastable to q; None leaves the coarse output out.
        gate_fine: broadcastable to q; None is 1.
        scale: factor of the scores, by default head_dim ** -0.5.
        selection: a selection to reuse, from an earlier step; the top-k is skipped.
        text_valid: (B, prefix + suffix) bool, which text tokens are real; the others are never
            attended.
        return_selection: also return the selection.
        return_lse: also return the fine stage's log-sum-exp.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out, the shape and type of q; then, as asked for, the ``Selection`` and the log-sum-exp, (B,
        heads, S) fp32, natural logarithm, raster order.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument, before any work
            is done.
        RuntimeError: an explicit backend that cannot run here, with what is missing.
    """
    call = inputs.resolve(
        q,
        k,
        v,
        grid=grid,
        kv_grid=kv_grid,
        tile=tile,
        scale=scale,
        text_valid=text_valid,
        selection=selection,
        gates={"gate_coarse": gate_coarse, "gate_fine": gate_fine},
        backend=backend,
    )
    checks.gate("gate_coarse", gate_coarse, q)
    checks.gate("gate_fine", gate_fine, q)
    num_key_tiles = call.kv_grid.num_tiles
    given = selection is not None and topk is None
    budget = resolve(1.0 if given else topk, num_key_tiles, call.q.shape[2])
    choose = selection is None and not budget.is_everything

    selection = None if selection is None else selection.savable()
    with torch.autocast(call.q.device.type, enabled=False):
        means: list[Tensor] = []
        if gate_coarse is not None:
            means = tile_means(_for_means(call), (call.grid, call.kv_grid, call.kv_grid))
        elif choose and not call.transformed:
            means = tile_means((call.q.detach(), call.k.detach()), (call.grid, call.kv_grid))
        coarse: Tensor | None = None
        if choose and gate_coarse is not None and is_one_operator(call.backend):
            selection, coarse = select_and_attend(means, budget, call)
        elif choose and call.transformed:
            selection = select_outside(budget, call)
        elif choose:
            selection = select_tiles(means[0], means[1], budget, call)
        elif selection is None:
            selection = everything(call)
        if gate_coarse is None:
            means = []  # nobody needs their memory any more
        out, lse = gated_attention(call, selection, means, coarse, gate_fine, gate_coarse)

    extras = [selection] * return_selection + [lse] * return_lse
    return (out, *extras) if extras else out


def _for_means(call: inputs.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, without gradient where that of their means does not go through autograd."""
    if is_one_operator(call.backend):
        return call.q.detach(), call.k.detach(), call.v.detach()
    return call.q, call.k, call.v
