# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles by the means of their runs, in plain PyTorch: see ``vsa.SubBlocks``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import accumulation_dtype, smallest_tile
from vsa.backends.torch_coarse import (
    SCORE_BYTES,
    SORT_BYTES,
    RowChoice,
    ScoreSlice,
    product,
    row_slices,
)
from vsa.values.grid import Grid
from vsa.values.problem import SubBlockScores


def select(asked: SubBlockScores) -> Tensor:
    """Arguments and result as in ``vsa.backends.base.Backend.select_by_sub_blocks``."""
    grid, kv_grid = asked.grids
    rows = RowChoice(
        (asked.q.shape[0], asked.q.shape[2], grid.num_tiles),
        kv_grid.num_tiles,
        asked.must,
        asked.topk,
        asked.mass,
        asked.q.device,
        asked.mask,
        asked.shares,
    )
    for part in score_slices(asked, SORT_BYTES if asked.mass else SCORE_BYTES):
        rows.choose(part)
    return rows.bitmap


def score_slices(asked: SubBlockScores, most_bytes: int) -> Iterator[ScoreSlice]:
    """Scores of tiles, some rows at a time: the logarithm of a sum over pairs of runs.

    Args:
        asked: what is scored.
        most_bytes: of the products that a slice is made of, unless a single row takes more.
    """
    runs, (grid, kv_grid) = asked.runs, asked.grids
    queries, keys = run_means(asked.q, grid, runs), run_means(asked.k, kv_grid, runs)
    empty, empty_keys = (empty_runs(each, runs, asked.q.device) for each in (grid, kv_grid))
    yield from _slices(queries, keys, empty, empty_keys, asked.scale, most_bytes)


def scores_of_rows(q: Tensor, k: Tensor, grid: Grid, runs: int, rows: Tensor | None) -> Tensor:
    """Scores of some query tiles, by the default scale.

    Args:
        q: (B, length, heads, head_dim).
        k: (B, length, kv_heads, head_dim).
        grid: of both.
        runs: of a tile.
        rows: numbers of the query tiles, None for all.

    Returns:
        (B, heads, query tiles, n).
    """
    queries, keys = run_means(q, grid, runs), run_means(k, grid, runs)
    empty = empty_keys = empty_runs(grid, runs, q.device)
    if rows is not None:
        queries = queries[:, :, rows]
        empty = None if empty is None else empty[rows]
    parts = _slices(queries, keys, empty, empty_keys, q.shape[-1] ** -0.5, SCORE_BYTES)
    found = torch.cat([part.scores.flatten(0, 1) for part in parts])
    return found.view(*queries.shape[:3], -1)


def _slices(
    queries: Tensor,
    keys: Tensor,
    empty: Tensor | None,
    empty_keys: Tensor | None,
    scale: float,
    most_bytes: int,
) -> Iterator[ScoreSlice]:
    batch, heads, tiles, runs, _ = queries.shape
    columns, group = keys.shape[2], heads // keys.shape[1]
    queries = queries.reshape(batch * heads // group, group * tiles, runs, -1)
    keys = keys.flatten(0, 1).flatten(1, 2)
    row_bytes = runs * runs * columns * queries.element_size()
    for some, rows in row_slices(len(queries), group * tiles, row_bytes, most_bytes):
        products = product(queries[some, rows].flatten(1, 2), keys[some], scale)
        products = products.unflatten(2, (columns, runs)).unflatten(1, (-1, runs))
        if empty is not None:
            of_rows = torch.arange(rows.start, rows.stop, device=empty.device) % tiles
            products.masked_fill_(empty[of_rows][:, :, None, None], float("-inf"))
        if empty_keys is not None:
            products.masked_fill_(empty_keys, float("-inf"))
        scores = products.logsumexp((2, 4))
        yield ScoreSlice(some.start * group * tiles + rows.start, some, rows, scores)


def run_means(x: Tensor, grid: Grid, runs: int) -> Tensor:
    """Mean of the tokens of every run of every tile.

    Args:
        x: (B, length, heads, head_dim), any strides; text tokens take no part.
        grid: the grid of x.
        runs: of a tile.

    Returns:
        (B, heads, num_tiles, runs, head_dim), fp32 or wider, contiguous; zeros where a run is
        empty.
    """
    tokens, sizes = _tokens_of_runs(grid, runs, x.device)
    there = tokens >= 0
    position = torch.where(there, tokens + grid.prefix, 0)
    means = []
    for each in x:  # a copy in another order: of one batch element at a time
        rows = each[position].masked_fill(~there[..., None, None], 0)
        total = rows.sum(2, dtype=accumulation_dtype(x))
        means.append((total / sizes.clamp(min=1)[..., None, None]).permute(2, 0, 1, 3))
    return torch.stack(means).contiguous()


def run_sizes(sizes: Tensor, runs: int) -> Tensor:
    """Tokens of every run, the first ones a token longer; sizes (...) -> (..., runs)."""
    run = torch.arange(runs, device=sizes.device)
    return sizes[..., None] // runs + (run < sizes[..., None] % runs)


def empty_runs(grid: Grid, runs: int, device: torch.device) -> Tensor | None:
    """Which runs have no tokens, (num_tiles, runs) bool; None where all have some."""
    if smallest_tile(grid) >= runs:
        return None
    return run_sizes(grid.tile_sizes(device), runs) == 0


def _tokens_of_runs(grid: Grid, runs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Video tokens of every run, (num_tiles, runs, longest run), -1 past its end; their number."""
    slots = grid.tokens_of_tiles(device)
    real = slots >= 0
    # Real tokens of every tile first, in order.
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    tokens = functional.pad(slots.gather(1, order), (0, 1), value=-1)
    sizes = run_sizes(real.sum(1), runs)
    place = torch.arange(-(-slots.shape[1] // runs), device=device)
    at = (sizes.cumsum(1) - sizes)[..., None] + place
    at = torch.where(place < sizes[..., None], at, slots.shape[1])
    return tokens.gather(1, at.flatten(1)).view(at.shape), sizes
