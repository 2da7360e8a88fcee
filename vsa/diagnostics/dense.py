# SPDX-License-Identifier: Apache-2.0
"""Dense attention of some query tiles to the video, a head and a few tiles at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.backends import torch_coarse
from vsa.backends.tiles import accumulation_dtype
from vsa.values.grid import Grid

SLICE_BYTES = 256 << 20
"""What a slice may take, unless a single query tile takes more."""


class ScoreSlice(NamedTuple):
    """Scores of some query tiles of one head.

    Attributes:
        batch: number of the batch element.
        head: number of the query head.
        rows: which of the query tiles that were asked for.
        queries: (tiles * slots, head_dim), what was multiplied.
        scores: (tiles * slots, n * slots), minus infinity where a key slot is empty.
    """

    batch: int
    head: int
    rows: slice
    queries: Tensor
    scores: Tensor


class WeightSlice(NamedTuple):
    """Dense attention of some query tiles of one head.

    Attributes:
        batch: number of the batch element.
        head: number of the query head.
        rows: which of the query tiles that were asked for.
        weights: (tiles * slots, n * slots), softmax over the keys; zero where a key slot is empty.
        mass: (tiles, n), the same by key tile, the mean over the tokens of a query tile.
    """

    batch: int
    head: int
    rows: slice
    weights: Tensor
    mass: Tensor


def tile_mass(q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None) -> Tensor:
    """Dense attention of query tiles to the video, added up by key tile.

    Args:
        q: (B, S, heads, head_dim).
        k: (B, S, kv_heads, head_dim).
        grid: of both.
        chosen: numbers of the query tiles, None for all.

    Returns:
        (B, heads, query tiles, n); rows add up to 1. The mean over the tokens of a query tile.
    """
    parts = [part.mass for part in weight_slices(q, k, grid, chosen)]
    return torch.cat(parts).view(q.shape[0], q.shape[2], -1, grid.num_tiles)


def weight_slices(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None
) -> Iterator[WeightSlice]:
    """Dense attention of query tiles to the video; arguments as in ``score_slices``."""
    token = grid.tokens_of_tiles(q.device)
    rows = token if chosen is None else token[chosen]
    n, slots = token.shape
    real = (rows >= 0).to(accumulation_dtype(q))[..., None]
    for batch, head, part, _, scores in score_slices(q, k, grid, chosen):
        weights = scores.softmax(-1)
        of_tile = weights.view(-1, slots, n, slots).sum(-1)
        mass = (of_tile * real[part]).sum(1) / real[part].sum(1)
        yield WeightSlice(batch, head, part, weights, mass)


def score_slices(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None, beside: int = 0
) -> Iterator[ScoreSlice]:
    """Scores between the tokens of query tiles and of the video.

    Args:
        q: (B, S, heads, head_dim); scores are fp32, or fp64 for fp64.
        k: (B, S, kv_heads, head_dim).
        grid: of both; slots are those of ``Grid.tokens_of_tiles``.
        chosen: numbers of the query tiles, None for all.
        beside: numbers that the caller keeps for each query token and key tile, for the size of a
            slice.
    """
    dtype = accumulation_dtype(q)
    token = grid.tokens_of_tiles(q.device)
    rows = token if chosen is None else token[chosen]
    batch, _, heads, head_dim = q.shape
    group, (n, slots) = heads // k.shape[2], token.shape
    queries = grid.prefix + rows.clamp(min=0)
    keys, beyond = grid.prefix + token.clamp(min=0).flatten(), (token < 0).flatten()
    step = max(1, SLICE_BYTES // (slots * n * (slots + beside) * dtype.itemsize))
    for b, head, first in product(range(batch), range(heads), range(0, len(rows), step)):
        part = slice(first, first + step)
        left = q[b, queries[part].flatten(), head].to(dtype)
        right = k[b, keys, head // group].to(dtype)
        scores = torch_coarse.product(left[None], right[None], head_dim**-0.5)[0]
        yield ScoreSlice(b, head, part, left, scores.masked_fill_(beyond, float("-inf")))
