# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention as dense attention under a mask of tokens, in fp64.

What ``vsa.verify.reference`` computes in loops over tokens, with whole matrices: many times faster,
and as independent of the package. Tests hold the two against each other. Differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.verify import reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: float | Sequence[float],
    *,
    mass: float = 0.0,
    grid: Sequence[int],
    tile: Sequence[int] = (4, 4, 4),
    prefix: int = 0,
    suffix: int = 0,
    kv_grid: Sequence[int] | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    runs: int = 1,
    mask: Tensor | None = None,
    text_valid: Tensor | None = None,
    tail: bool = False,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``vsa.verify.reference.attention``, on the CPU."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))  # (B, heads, S, head_dim)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    query_tiles, key_tiles = (
        membership(shape, tile, prefix, suffix) for shape in (grid, kv_grid or grid)
    )
    q_means, k_means, v_means = (
        tiles / tiles.sum(-1, keepdim=True) @ x
        for tiles, x in ((query_tiles, q), (key_tiles, k), (key_tiles, v))
    )
    coarse_scores = scale * q_means @ k_means.mT
    scores = coarse_scores
    if runs > 1 and mask is None:
        of_q, of_k = (
            tiles_in_runs(shape, tile, prefix, suffix, runs) for shape in (grid, kv_grid or grid)
        )
        scores = sub_block_scores(q, k, (of_q, of_k), scale)
    chosen = choice(scores, topk, mass, allowed) if mask is None else mask
    attends = attended(chosen, query_tiles, key_tiles, text_valid)
    bias = q.new_zeros(k.shape[2])
    if tail:  # means are further keys of the video's queries
        k, v = torch.cat((k, k_means), dim=2), torch.cat((v, v_means), dim=2)
        left_out = ~chosen if allowed is None else ~chosen & allowed
        left_out = query_tiles.T @ left_out.double() > 0
        attends = torch.cat((attends.expand(*left_out.shape[:2], -1, -1), left_out), dim=-1)
        bias = torch.cat((bias, key_tiles.sum(-1).log()))
    idle = ~attends.any(-1, keepdim=True)
    scores = (scale * q @ k.mT + bias).masked_fill(~(attends | idle), -math.inf)
    out = scores.softmax(-1).masked_fill(idle, 0) @ v
    lse = scores.logsumexp(-1).masked_fill(idle.squeeze(-1), -math.inf)
    out = out.transpose(1, 2)
    if gate_fine is not None:
        out = gate_fine.double() * out
    if gate_coarse is not None:
        weights = coarse_softmax(coarse_scores, allowed)
        coarse = query_tiles.T @ (weights @ v_means)  # text is in no tile
        out = out + gate_coarse.double() * coarse.transpose(1, 2)
    return out, chosen, lse


def coarse_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Of the tiles that each row may choose; zeros where there are none."""
    if allowed is None:
        return scores.softmax(-1)
    nothing = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(~(allowed | nothing), -math.inf).softmax(-1).masked_fill(nothing, 0)


def membership(grid: Sequence[int], tile: Sequence[int], prefix: int, suffix: int) -> Tensor:
    """(num_tiles, S) fp64, 1 where a token of the sequence lies in a tile."""
    tiles = reference.tiles_of(grid, tile, prefix)
    inside = torch.zeros(len(tiles), prefix + math.prod(grid) + suffix, dtype=torch.float64)
    for row, tokens in zip(inside, tiles, strict=True):
        row[tokens] = 1
    return inside


def tiles_in_runs(
    grid: Sequence[int], tile: Sequence[int], prefix: int, suffix: int, runs: int
) -> Tensor:
    """(num_tiles, runs, S) fp64, a token's share of the mean of a run; NaN in empty runs."""
    tiles = reference.tiles_of(grid, tile, prefix)
    shares = torch.full((len(tiles), runs, prefix + math.prod(grid) + suffix), math.nan).double()
    for each, tokens in zip(shares, tiles, strict=True):
        for row, run in zip(each, reference.runs_of(tokens, runs), strict=False):
            row.zero_()
            row[run] = 1 / len(run)
    return shares


def sub_block_scores(q: Tensor, k: Tensor, tiles: Sequence[Tensor], scale: float) -> Tensor:
    """Scores of ``vsa.SubBlocks``; q and k (B, heads, S, head_dim), tiles from ``tiles_in_runs``.

    Returns:
        (B, heads, n_q, n_k).
    """
    q_means, k_means = _means_of_runs(q, k, tiles)
    products = scale * torch.einsum("bhiad,bhjcd->bhijac", q_means, k_means)
    of_q, of_k = (shares[..., 0].isnan() for shares in tiles)
    empty = of_q[:, None, :, None] | of_k[None, :, None]
    return products.masked_fill(empty, -math.inf).logsumexp((-2, -1))


def sub_block_bound(q: Tensor, k: Tensor, tiles: Sequence[Tensor], scale: float) -> Tensor:
    """How far from ``sub_block_scores`` those of our kernels may be; arguments as there."""
    q_means, k_means = (means.abs() for means in _means_of_runs(q, k, tiles))
    sums = torch.einsum("bhiad,bhjcd->bhijac", q_means, k_means).amax((-2, -1))
    truth = sub_block_scores(q, k, tiles, scale)
    return rounding_bound(truth, sums, scale)


def rounding_bound(truth: Tensor, sums: Tensor, scale: float) -> Tensor:
    """How far from true scores of runs those may be whose means of runs are rounded to fp16.

    csrc/kernels/coarse/sub_block_scores.h derives the first term. The others are those of
    approximate powers and logarithms.

    Args:
        truth: scores.
        sums: like truth, the largest sum of products of absolute values among pairs of runs.
        scale: factor of the products.
    """
    return 2**-10 * abs(scale) * sums + 2**-20 * truth.abs() + 2**-20


def _means_of_runs(q: Tensor, k: Tensor, tiles: Sequence[Tensor]) -> list[Tensor]:
    """(B, heads, tiles, runs, head_dim) of each, zeros in empty runs."""
    return [
        torch.einsum("iat,bhtd->bhiad", shares.nan_to_num(0), x)
        for x, shares in zip((q, k), tiles, strict=True)
    ]


def within(chosen: Tensor, scores: Tensor, bound: Tensor, count: Tensor, mass: float) -> Tensor:
    """Rows whose choice some scores within the bound of these make.

    Args:
        chosen: (..., n_k) bool.
        scores: (..., n_k).
        bound: like scores.
        count: (..., ) least tiles of a row, or broadcastable to that.
        mass: least share of a row's softmax.

    Returns:
        (...) bool.
    """
    kept = (scores + bound).masked_fill(~chosen, math.inf).amin(-1)
    left = (scores - bound).masked_fill(chosen, -math.inf).amax(-1)
    number, off = chosen.sum(-1), 2 * bound.amax(-1)
    weights = scores.softmax(-1).masked_fill(~chosen, 0)
    smallest = weights.masked_fill(~chosen, math.inf).amin(-1)
    held = weights.sum(-1)
    enough = (held >= mass - off) & ((number == count) | (held - smallest < mass + off))
    return (kept >= left) & (number >= count) & (enough if mass else number == count)


def choice(
    scores: Tensor,
    topk: float | Sequence[float],
    mass: float = 0.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """Scores (B, heads, n_q, n_k) -> bool, which key tiles ``reference.best`` picks."""
    may = torch.ones_like(scores, dtype=torch.bool)
    if allowed is not None:
        may &= allowed
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        each = topk[h] if isinstance(topk, Sequence) else topk
        these = may[b, h, i].nonzero().flatten()
        picked = reference.best(scores[b, h, i, these].tolist(), each, mass)
        chosen[b, h, i, these[picked]] = True
    return chosen


def attended(
    chosen: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    text_valid: Tensor | None = None,
) -> Tensor:
    """Which tokens attend which.

    Args:
        chosen: (B, heads, n_q, n_k) bool, the choice of tiles.
        query_tiles: (n_q, S_q), from ``membership``.
        key_tiles: (n_k, S_k), from ``membership``.
        text_valid: (B, prefix + suffix) bool, which text tokens are real; None for all.

    Returns:
        (B, heads, S_q, S_k) bool. Video attends its tiles and real text, real text everything.
    """
    video_q, video_k = (tiles.sum(0) > 0 for tiles in (query_tiles, key_tiles))
    text_q, text_k = (_real_text(video, text_valid) for video in (video_q, video_k))
    tiles = query_tiles.T @ chosen.double() @ key_tiles > 0
    of_video = tiles | (video_q[:, None] & text_k[:, None, None])
    return of_video | (text_q[:, None, :, None] & (video_k | text_k)[:, None, None])


def _real_text(video: Tensor, text_valid: Tensor | None) -> Tensor:
    """(B or 1, S) bool, where the sequence holds text that is real."""
    if text_valid is None:
        return ~video[None]
    real = torch.zeros(len(text_valid), len(video), dtype=torch.bool)
    real[:, ~video] = text_valid
    return real
