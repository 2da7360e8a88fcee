# SPDX-License-Identifier: Apache-2.0
"""What full and sparse attention cost, in floating-point operations, per stage."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch

from vsa.stages import sequences
from vsa.stages.inputs import Layout
from vsa.stages.sequences.operations import count
from vsa.values import checks, masks
from vsa.values.budget import Budget, TopK, resolve
from vsa.values.grid import Grid
from vsa.values.masks import Mask
from vsa.values.score import Score, runs_of
from vsa.values.sequence import Sequence
from vsa.values.tile_mask import spend

BACKWARD = 2.5
"""Cost of a backward over its forward: five products of the same size against two."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one attention layer; a multiply-add counts as two.

    Attributes:
        full: dense attention.
        coarse: tile means and attention between them.
        select: the scores for the top-k (those of tile means are the coarse stage's, counted once
            more).
        fine: attention inside the selected tiles, text included.
        combine: gates and sum.
        tail: attention to the means of tiles that were not selected; 0 without a tail.
    """

    full: float
    coarse: float
    select: float
    fine: float
    combine: float
    tail: float = 0.0

    @property
    def stages(self) -> dict[str, float]:
        """Operations of each stage of sparse attention by name."""
        return {
            "coarse": self.coarse,
            "select": self.select,
            "fine": self.fine,
            "tail": self.tail,
            "combine": self.combine,
        }

    @property
    def sparse(self) -> float:
        """Sparse attention, all stages."""
        return sum(self.stages.values())

    @property
    def ratio(self) -> float:
        """How many times less work sparse attention is."""
        return self.full / self.sparse


def flops(
    grid: Layout,
    heads: int,
    head_dim: int,
    topk: TopK | None,
    backward: bool = True,
    *,
    batch: int = 1,
    kv_grid: Layout | None = None,
    score: Score = "mean",
    tail: bool = False,
    mask: Mask | None = None,
) -> Flops:
    """Count the operations of one call of ``vsa.attention`` with a coarse gate.

    Ragged tiles count with the mean size of a key tile, those of a ``vsa.Sequence`` with that of
    their segments. Padding, and copies to and from padded tiles, are no operations.

    Args:
        grid: (T, H, W), ``vsa.Grid`` or ``vsa.Sequence`` of the queries.
        heads: query heads.
        head_dim: channels of a head.
        topk: key tiles per query tile, as in ``vsa.attention``, but for a ``vsa.TopP``, whose
            number only the scores can tell: pass the density of a selection.
        backward: count forward and backward, else the forward alone. The choice of tiles has no
            backward.
        batch: batch size.
        kv_grid: the keys' grid where it differs.
        score: what tiles are chosen by; a ``vsa.SubBlocks(n)`` takes n * n products for one.
        tail: count the tail as well, as in ``vsa.attention``.
        mask: which tiles may be chosen, as in ``vsa.attention``: only these count, in dense
            attention as well.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(grid, Sequence) or isinstance(kv_grid, Sequence):
        call = sequences.grids_of(grid, kv_grid, topk)
        if call is None:
            sequences.refuse(score, tail, mask)
            return _of_sequences(grid, kv_grid, heads, head_dim, topk, backward, batch)
        grid, kv_grid, topk = call[:3]
    queries = grid if isinstance(grid, Grid) else Grid(grid)
    keys = queries if kv_grid is None else kv_grid if isinstance(kv_grid, Grid) else Grid(kv_grid)
    each = (
        checks.integer("batch", batch, 1)
        * checks.integer("heads", heads, 1)
        * checks.integer("head_dim", head_dim, 1)
    )
    budget = resolve(topk, keys.num_tiles, heads)
    if budget.mass:
        raise ValueError(
            "topk must say how many tiles are kept for their operations to be counted, "
            f"but it is {topk}: pass the density of a selection"
        )
    kept_tiles, may = fmean(budget.counts), float(keys.num_tiles)
    if mask is not None:
        kept_tiles, may = _under(mask, queries, keys, heads, budget)
    tile_tokens = keys.tokens / keys.num_tiles
    kept, allowed = kept_tiles * tile_tokens, may * tile_tokens
    left_out = (may - kept_tiles) * checks.flag("tail", tail)
    factor = 1 + BACKWARD * bool(backward)
    tile_pairs, linear = queries.num_tiles * may, 1 + bool(backward)
    text = queries.tokens * keys.text + queries.text * keys.length
    return Flops(
        full=factor * 4 * each * (queries.tokens * allowed + text),
        coarse=factor * 4 * each * tile_pairs + linear * each * (queries.tokens + 2 * keys.tokens),
        select=2.0 * each * tile_pairs * runs_of(score) ** 2,
        fine=factor * 4 * each * (queries.tokens * kept + text),
        combine=linear * 3.0 * each * queries.length,
        tail=factor * 4 * each * queries.tokens * left_out,
    )


def _of_sequences(
    grid: Layout,
    kv_grid: Layout | None,
    heads: int,
    head_dim: int,
    topk: TopK | None,
    backward: bool,
    batch: int,
) -> Flops:
    """``flops`` of what is no call over grids."""
    each = (
        checks.integer("batch", batch, 1)
        * checks.integer("heads", heads, 1)
        * checks.integer("head_dim", head_dim, 1)
    )
    pairs = count(grid, kv_grid, topk, heads)
    factor, linear = 1 + BACKWARD * bool(backward), 1 + bool(backward)
    return Flops(
        full=factor * 4 * each * pairs.full,
        coarse=factor * 4 * each * pairs.coarse + linear * each * pairs.averaged,
        select=2.0 * each * pairs.scored,
        fine=factor * 4 * each * pairs.fine,
        combine=linear * 3.0 * each * pairs.queries,
    )


def _under(
    mask: Mask, grid: Grid, kv_grid: Grid, heads: int, budget: Budget
) -> tuple[float, float]:
    """Tiles that a row keeps on average, and that it may choose."""
    found = masks.resolve(mask, grid, kv_grid, heads)
    assert found is not None
    may = torch.cat(list(found.counts(grid.num_tiles)), dim=-1).cpu()  # (heads or 1, n_q)
    kept = []
    for head in range(heads):
        budget_of = head % len(budget.counts)
        count = torch.tensor(budget.counts[budget_of])
        share = torch.tensor(budget.shares[budget_of], dtype=torch.float64)
        kept.append(spend(may[head % len(may)], count, share).double().mean().item())
    return fmean(kept), may.double().mean().item()
