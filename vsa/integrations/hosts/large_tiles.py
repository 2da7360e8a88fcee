# SPDX-License-Identifier: Apache-2.0
"""Raster attention by tiles of 128 or 256 tokens, and behind segments with tiles of their own.

A tile of (4, 8, 8) is four of (4, 4, 4) that lie beside each other. Its mean is theirs weighted by
their sizes, and all of them share its row of the choice; then the fine stage runs as ever, on the
tokens where they lie.

Segments before the video (text, conditions, audio) are runs of tokens, cut into tiles of as many
tokens as the video's, none of which holds tokens of two segments. All queries keep them, and their
queries keep everything, which is what text is to the fine stage. What tiles they have matters to
the coarse branch alone, where they stand before the video's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends import named
from vsa.backends.torch_combine import combine
from vsa.operators import coarse_select
from vsa.stages import inputs
from vsa.stages.coarse import tile_means
from vsa.values import bitmap, checks
from vsa.values import budget as budgets
from vsa.values.grid import SLOTS, Extent, Grid
from vsa.values.problem import TileScores
from vsa.values.selection import Selection


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    grid: Extent,
    tile: Extent,
    gate: Tensor | None = None,
    segments: Sequence[int] = (),
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``vsa.attention`` for such tiles and segments; differentiable in q, k, v and the gate.

    Args:
        q: (B, S, heads, head_dim), the segments and then the video in raster order.
        k: (B, S, kv_heads, head_dim).
        v: like k.
        topk: large key tiles per large query tile, clamped to their number.
        grid: (T, H, W).
        tile: tokens along (t, h, w), at most 64 in all, or 128 or 256, of which every part of 64
            is an even share.
        gate: factor of the coarse output, broadcastable to q; None leaves it out.
        segments: tokens of each segment before the video.
        scale: factor of the scores, by default head_dim ** -0.5.
        backend: as in ``vsa.attention``.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
    """
    checks.gate("gate", gate, q)
    out, coarse, cut = _both(
        q, k, v, topk, grid, tile, gate, segments, scale, backend, with_coarse=gate is not None
    )
    if coarse is None or gate is None:
        return out
    with torch.autocast(q.device.type, enabled=False):
        return _gated(out, coarse, gate.expand(q.shape), cut, tile, segments)


def branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    grid: Extent,
    tile: Extent,
    segments: Sequence[int] = (),
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The fine output, and the coarse one of every tile, ungated; arguments as in ``attention``.

    Returns:
        out: (B, S, heads, head_dim).
        coarse: (B, heads, n, head_dim) fp32 or wider, tiles of segments first.
    """
    out, coarse, _ = _both(
        q, k, v, topk, grid, tile, None, segments, scale, backend, with_coarse=True
    )
    assert coarse is not None
    return out, coarse


def _both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    grid: Extent,
    tile: Extent,
    gate: Tensor | None,
    segments: Sequence[int],
    scale: float | None,
    backend: str,
    *,
    with_coarse: bool,
) -> tuple[Tensor, Tensor | None, Grid]:
    """The fine output, the coarse one of every tile if asked for, and the grid of small tiles."""
    split = parts_of(tile)
    part = tile[0] // split[0], tile[1] // split[1], tile[2] // split[2]
    cut = Grid(grid, tile=part, prefix=sum(segments))
    gates = {} if gate is None else {"gate": gate}
    call = inputs.resolve(q, k, v, grid=cut, scale=scale, gates=gates, backend=backend)
    large, counts = _large_tiles(cut, split, q.device)
    budget = budgets.resolve(topk, counts.numel(), q.shape[2])
    who = named(call.backend)
    with torch.autocast(q.device.type, enabled=False):
        xs: list[Tensor] = [call.q.detach(), call.k.detach()]
        if with_coarse:
            xs = [call.q, call.k, call.v]
        means = [
            _merged(mean, cut, split, counts)
            for mean in tile_means(xs, [cut] * len(xs), call.backend)
        ]
        scores = TileScores(
            means[0].detach(),
            means[1].detach(),
            None,
            budget.counts,
            budget.mass,
            budget.numbers,
            call.scale,
            call.backend,
        )
        if "select" in who.composed:
            chosen = who.select(scores)[0]
        else:
            chosen = coarse_select.select_tiles(*scores)
        kept = bitmap.unpack(chosen, counts.numel())
        kept = kept.index_select(-1, large).index_select(-2, large)
        most = None if budget.most is None else budget.most * math.prod(split)
        selection = Selection(bitmap.pack(kept), cut.num_tiles, cut, cut, most)
        out = vsa.block_sparse_attention(
            call.q, call.k, call.v, selection, grid=cut, scale=scale, backend=call.backend
        )
        if not with_coarse:
            return out, None, cut
        means = [
            torch.cat([_segment_means(x, segments, math.prod(tile), mean.dtype), mean], dim=2)
            for x, mean in zip(xs, means, strict=True)
        ]
        return out, who.coarse_attention(means[0], means[1], means[2], call.scale), cut


def _gated(
    out: Tensor, coarse: Tensor, gate: Tensor, cut: Grid, tile: Extent, segments: Sequence[int]
) -> Tensor:
    """Out + gate * coarse of the token's tile."""
    large, counts = _large_tiles(cut, parts_of(tile), out.device)
    first = coarse.shape[2] - counts.numel()
    whole = combine(out, coarse.index_select(2, first + large), None, gate, cut)
    if not segments:
        return whole
    before = _tiles_of_segments(segments, math.prod(tile), out.device)
    spread = coarse.index_select(2, before).transpose(1, 2)
    head = (out[:, : cut.prefix].to(spread.dtype) + gate[:, : cut.prefix] * spread).to(out.dtype)
    return torch.cat([head, whole[:, cut.prefix :]], dim=1)


def _tiles_of_segments(segments: Sequence[int], volume: int, device: torch.device) -> Tensor:
    """The tile of every token before the video, counted over all segments."""
    tiles, before = [torch.zeros(0, dtype=torch.int64, device=device)], 0
    for length in segments:
        tiles.append(before + torch.arange(length, device=device) // volume)
        before += -(-length // volume)
    return torch.cat(tiles)


def _segment_means(x: Tensor, segments: Sequence[int], volume: int, dtype: torch.dtype) -> Tensor:
    """(B, heads, n, head_dim) means of the tiles before the video, of x (B, S, heads, head_dim)."""
    means, begin = [x.new_zeros(x.shape[0], x.shape[2], 0, x.shape[3], dtype=dtype)], 0
    for length in segments:
        short = -length % volume
        tokens = x[:, begin : begin + length].transpose(1, 2)
        tiles = functional.pad(tokens, (0, 0, 0, short)).unflatten(2, (-1, volume))
        sizes = torch.full((tiles.shape[2], 1), volume, dtype=dtype, device=x.device)
        sizes[-1] -= short
        means.append(tiles.sum(3, dtype=dtype) / sizes)
        begin += length
    return torch.cat(means, dim=2)


def parts_of(tile: Extent) -> Extent:
    """How many tiles of at most 64 tokens a large one is along (t, h, w): (1, 2, 2) of (4, 8, 8).

    Raises:
        ValueError: a tile that even halves do not bring to 64 tokens.
    """
    left = list(tile)
    while math.prod(left) > SLOTS:
        axis = max(range(3), key=lambda axis: (left[axis] % 2 == 0, left[axis]))
        if left[axis] % 2:
            raise ValueError(
                f"the host's tile must be at most {SLOTS} tokens, or such tiles times a power of "
                f"two, but it is {tile}"
            )
        left[axis] //= 2
    return tile[0] // left[0], tile[1] // left[1], tile[2] // left[2]


def _large_tiles(cut: Grid, split: Extent, device: torch.device) -> tuple[Tensor, Tensor]:
    """The large tile that each small one lies in, and the tokens of each large one."""
    axes = [
        torch.arange(count, device=device) // parts
        for count, parts in zip(cut.tiles, split, strict=True)
    ]
    _, nh, nw = _over(cut.tiles, split)
    large = ((axes[0][:, None, None] * nh + axes[1][:, None]) * nw + axes[2]).flatten()
    sizes = cut.tile_sizes(device).view(1, 1, -1, 1)
    return large, _summed(sizes, cut.tiles, split).flatten()


def _merged(mean: Tensor, cut: Grid, split: Extent, counts: Tensor) -> Tensor:
    """(B, heads, n, head_dim) means of large tiles, from those of small ones."""
    weighted = mean * cut.tile_sizes(mean.device).view(-1, 1)
    return _summed(weighted, cut.tiles, split) / counts.view(-1, 1)


def _summed(x: Tensor, tiles: Extent, split: Extent) -> Tensor:
    """Sums over the small tiles of each large one: (B, heads, n, D) to (B, heads, large n, D)."""
    large = _over(tiles, split)
    short = [n * parts - tile for n, parts, tile in zip(large, split, tiles, strict=True)]
    x = x.unflatten(2, tiles)
    x = functional.pad(x, (0, 0, 0, short[2], 0, short[1], 0, short[0]))
    for axis in (2, 1, 0):
        x = x.unflatten(2 + axis, (large[axis], split[axis])).sum(3 + axis)
    return x.flatten(2, 4)


def _over(tiles: Extent, split: Extent) -> Extent:
    t, h, w = (-(-tile // parts) for tile, parts in zip(tiles, split, strict=True))
    return t, h, w
