# SPDX-License-Identifier: Apache-2.0
"""What selections look like, to choose ``topk`` by: density, recall, and who chooses alike.

Numbers only, on the device of the selections and without waiting for it; ``vsa.plots`` draws them.

An overlap is the share of kept tiles that two choices have in common: twice the tiles that both
keep over the tiles that each keeps, added up over query tiles. It is 1 for equal choices, 0 for
disjoint ones, about the density for unrelated ones, and NaN where nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vsa.stages import inputs, sequences
from vsa.stages.fine import video_lse
from vsa.stages.select import choose, everything
from vsa.values import bitmap, checks
from vsa.values.budget import TopK, resolve
from vsa.values.grid import Extent, Grid
from vsa.values.masks import Mask
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection, measured_by
from vsa.values.tile_mask import TileMask


@dataclass(frozen=True, eq=False)
class NeighbourOverlap:
    """Overlap of query tiles with the next one along each axis; NaN along an axis of one tile.

    Attributes:
        t: (B, heads) fp32.
        h: likewise.
        w: likewise.
    """

    t: Tensor
    h: Tensor
    w: Tensor


@dataclass(frozen=True, eq=False)
class RecallCurve:
    """What several budgets keep, per batch element and head.

    Attributes:
        topks: the budgets.
        density: (len(topks), B, heads) fp32, share of the key tiles that a query tile keeps.
        recall: (len(topks), B, heads), share of the dense attention mass on them.
    """

    topks: tuple[TopK, ...]
    density: Tensor
    recall: Tensor


def density(selection: Selection) -> Tensor:
    """Share of the key tiles that a query tile keeps on average, (B, heads) fp32."""
    return bitmap.count(selection.bitmap).float().mean(-1) / selection.num_key_tiles


def overlap(a: Selection, b: Selection) -> Tensor:
    """Overlap of two selections for the same tiles, of two layers or two steps for instance.

    Returns:
        (B, heads) fp32.

    Raises:
        ValueError: selections of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(
            "a and b must be selections for the same batch, heads and tiles, but they are for "
            f"{a.shape} and {b.shape}"
        )
    return _overlap(a.bitmap, b.bitmap)


def neighbour_overlap(selection: Selection) -> NeighbourOverlap:
    """Overlap of each query tile's choice with its neighbours': what a kernel can share.

    Raises:
        ValueError: a selection that does not know the queries' grid.
    """
    if selection.grid is None:
        raise ValueError(
            "selection must know the grid of its queries for neighbours to be found: "
            "pass grid= to Selection.from_mask"
        )
    tiles = selection.bitmap.unflatten(2, selection.grid.tiles)
    pairs = [
        (tiles.narrow(axis, 0, length - 1), tiles.narrow(axis, 1, length - 1))
        for axis, length in enumerate(selection.grid.tiles, start=2)
    ]
    return NeighbourOverlap(*(_overlap(a.flatten(2, 4), b.flatten(2, 4)) for a, b in pairs))


def head_overlap(selection: Selection) -> Tensor:
    """Overlap of every head with every other, (B, heads, heads) fp32."""
    words = selection.bitmap
    return torch.stack(
        [_overlap(words[:, head, None], words) for head in range(words.shape[1])], dim=1
    )


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Of bitmaps (B, heads, rows, words), heads broadcast: -> (B, heads)."""
    shared, *kept = (bitmap.count(words).sum(-1) for words in (a & b, a, b))
    return (2 * shared / sum(kept)).float()


@measured_by("recall")
def recall(
    selection: Selection,
    q: Tensor,
    k: Tensor,
    *,
    grid: inputs.Layout | None = None,
    kv_grid: inputs.Layout | None = None,
    scale: float | None = None,
    text_valid: Tensor | None = None,
    mask: Mask | None = None,
    backend: str = "auto",
) -> Tensor:
    """``Selection.recall`` of a selection, with its arguments and its result."""
    if sequences.are_meant(grid, kv_grid, selection):
        given = sequences.Given(
            q, k, k, None, grid, kv_grid, inputs.DEFAULT_TILE, scale, selection, text_valid, backend
        )
        found = sequences.recall(given)
        if isinstance(found, Tensor):
            return found
        grid, kv_grid, _, selection, text_valid = found
    call = inputs.resolve(
        q,
        k,
        k,
        grid=grid,
        kv_grid=kv_grid,
        scale=scale,
        text_valid=text_valid,
        selection=selection,
        backend=backend,
        mask=mask,
    )
    if mask is not None:
        inputs.check_inside(selection, call)
    with torch.no_grad():
        return _share(video_lse(call, selection), _dense_lse(call))


def _dense_lse(call: inputs.Inputs) -> Tensor:
    """Of dense attention, under the mask of the call."""
    return video_lse(call, everything(call.q, call.grid, call.kv_grid, call.mask))


def _share(kept: Tensor, dense: Tensor) -> Tensor:
    """From log-sum-exps (B, heads, tokens); a token that may attend nothing has lost nothing."""
    idle = dense == float("-inf")
    return (kept - dense).masked_fill(idle, 0).exp().mean(-1)


def sampled_recall(selection: Selection, q: Tensor, k: Tensor, *, tiles: int) -> Tensor:
    """Recall of the video's attention to itself, measured for a few query tiles.

    Args:
        selection: one that knows the grid that q and k have in common.
        q: (B, S, heads, head_dim), text included where the grid has some.
        k: (B, S, kv_heads, head_dim); kv_heads divides heads.
        tiles: how many query tiles, spread evenly over those that are whole.

    Returns:
        (B, heads) in [0, 1], of dense attention to video tokens; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: a selection without a grid, or tensors that do not fit it.
    """
    if selection.grid is None or selection.grid != selection.kv_grid:
        raise ValueError(
            "selection must know one grid for queries and keys for tiles to be sampled: pass "
            "grid= to Selection.from_mask"
        )
    grid = replace(selection.grid, prefix=0, suffix=0)
    for name, x in (("q", q), ("k", k)):
        selection.grid.check_length(name, x.shape[1])
    chosen, tokens = whole_tiles(grid, checks.integer("tiles", tiles, at_least=1), q.device)
    count, size = tokens.shape
    rows = selection.bitmap[:, :, chosen].contiguous()
    queries = Grid((count, 1, size), tile=(1, 1, size))
    under = selection.under
    if under is not None:
        under = TileMask((), under.matrix(grid.num_tiles, q.device)[:, chosen])
    sample = Selection(rows, selection.num_key_tiles, queries, grid, selection.most, under)
    first = selection.grid.prefix
    return sample.recall(q[:, first + tokens.flatten()], k[:, first : first + grid.tokens])


@lru_cache(maxsize=16)
def whole_tiles(grid: Grid, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of tiles that are not clipped, (n,), and their tokens, (n, volume of ``box``)."""
    tokens = grid.tokens_of_tiles()
    whole = (tokens >= 0).all(1).nonzero()[:, 0]
    places = torch.linspace(0, len(whole) - 1, min(most, len(whole))).round().long()
    return whole[places].to(device), tokens[whole[places]].to(device)


def recall_curve(
    q: Tensor,
    k: Tensor,
    topks: Sequence[TopK],
    *,
    grid: Extent | Grid | None = None,
    kv_grid: Extent | Grid | None = None,
    tile: inputs.Tile = inputs.DEFAULT_TILE,
    scale: float | None = None,
    score: Score = "mean",
    text_valid: Tensor | None = None,
    mask: Mask | None = None,
    backend: str = "auto",
) -> RecallCurve:
    """Density and recall of several budgets; dense attention is computed once.

    Args:
        q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
        k: the same with the keys' grid.
        topks: budgets, each as ``topk`` in ``vsa.attention``.
        grid: the queries' grid.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w), or "auto".
        scale: factor of the scores, by default head_dim ** -0.5.
        score: what tiles are chosen by, as in ``vsa.attention``. Curves of two scores at the same
            numbers or shares of tiles compare them at equal cost; a ``vsa.TopP`` keeps another
            number by either.
        text_valid: (B, prefix + suffix) bool, which text tokens are real.
        mask: as in ``vsa.attention``; dense attention is under it as well.
        backend: as in ``vsa.attention``.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
    """
    with torch.no_grad():
        call = inputs.resolve(
            q,
            k,
            k,
            grid=grid,
            kv_grid=kv_grid,
            tile=tile,
            scale=scale,
            text_valid=text_valid,
            backend=backend,
            mask=mask,
        )
        runs = runs_of(score)
        checks.not_empty("topks", topks)
        budgets = [resolve(topk, call.kv_grid.num_tiles, call.q.shape[2]) for topk in topks]
        with torch.autocast(call.q.device.type, enabled=False):
            selections = [choose(call, budget, runs) for budget in budgets]
            dense = _dense_lse(call)
            recalls = [_share(video_lse(call, each), dense) for each in selections]
    return RecallCurve(
        tuple(topks), torch.stack([density(each) for each in selections]), torch.stack(recalls)
    )
