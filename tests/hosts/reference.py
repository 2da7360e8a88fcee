# SPDX-License-Identifier: Apache-2.0
"""What a host's VSA layer is to compute, from the tile of each token, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def video_tiles(grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """The tile of every token of a video in raster order, (T * H * W,)."""
    axes = [torch.arange(extent) // size for extent, size in zip(grid, tile, strict=True)]
    counts = [-(-extent // size) for extent, size in zip(grid, tile, strict=True)]
    t, h, w = axes
    return ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()


def packed_tiles(segments: Sequence[int], video: Tensor, volume: int) -> tuple[Tensor, int]:
    """The tiles of segments that share none, then of the video; and how many come before it."""
    tiles, before = [], 0
    for length in segments:
        tiles.append(before + torch.arange(length) // volume)
        before += -(-length // volume)
    return torch.cat([*tiles, before + video]), before


def mixed_tiles(
    segments: Sequence[int | Sequence[int]], tile: Sequence[int]
) -> tuple[Tensor, int, list[tuple[int, int]]]:
    """The tile of every token where flat segments and videos take turns.

    The hosts count those of all flat segments first. Returns that, how many these are, and where
    the tiles of each video begin and end.
    """
    volume, flat = math.prod(tile), [each for each in segments if isinstance(each, int)]
    before = sum(-(-each // volume) for each in flat)
    of_token, next_flat, next_video, spans = [], 0, before, []
    for each in segments:
        if isinstance(each, int):
            of_token.append(next_flat + torch.arange(each) // volume)
            next_flat += -(-each // volume)
        else:
            of_token.append(next_video + video_tiles(each, tile))
            spans.append((next_video, int(of_token[-1].max()) + 1))
            next_video = spans[-1][1]
    return torch.cat(of_token), before, spans


def exempt(scores: Tensor, topk: int, before: int) -> Tensor:
    """Which tiles are kept where those before the video are: as many of the video's as topk."""
    return regions(scores, before, [(before, scores.shape[-1])], [topk])


def regions(
    scores: Tensor, before: int, spans: Sequence[tuple[int, int]], counts: Sequence[int]
) -> Tensor:
    """Likewise of several videos, each with a number of tiles of its own."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for (first, last), count in zip(spans, counts, strict=True):
        best = scores[..., first:last].topk(min(count, last - first), dim=-1).indices + first
        kept.scatter_(-1, best, True)
    kept[..., :before] = kept[..., :before, :] = True
    return kept


def compete(scores: Tensor, topk: int, before: int) -> Tensor:
    """Where those before the video compete with it for as many tiles as topk and they are."""
    best = scores.topk(min(topk + before, scores.shape[-1]), dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    kept[..., :before, :] = True
    return kept


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    topk: int,
    gate: Tensor | None,
    before: int = 0,
    scale: float | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The layer's output, (B, S, heads, head_dim) in the order of its tokens.

    Args:
        q: (B, S, heads, head_dim), and so are k, v and the gate, of which None is no coarse branch.
        k: see q.
        v: see q.
        tiles: (S,), the tile of each token.
        topk: tiles of the video that a row keeps.
        gate: see q.
        before: tiles of other segments, which all rows keep and whose rows keep everything.
        scale: factor of the scores.
        choose: of the scores (B, heads, n, n), which tiles each keeps, bool of that shape, in the
            place of the rule of topk.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of = functional.one_hot(tiles).double()
    means = [torch.einsum("bshd,sn->bhnd", x, of) / of.sum(0)[:, None] for x in (q, k, v)]
    scores = scale * means[0] @ means[1].transpose(-1, -2)
    kept = exempt(scores, topk, before) if choose is None else choose(scores)
    allowed = kept[:, :, tiles][:, :, :, tiles]
    weights = scale * torch.einsum("bshd,bthd->bhst", q, k)
    weights = weights.masked_fill(~allowed, -math.inf).softmax(-1)
    out = torch.einsum("bhst,bthd->bshd", weights, v)
    if gate is None:
        return out
    coarse = scores.softmax(-1) @ means[2]
    return out + gate.double() * coarse[:, :, tiles].transpose(1, 2)
