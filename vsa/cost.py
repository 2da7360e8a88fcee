# SPDX-License-Identifier: Apache-2.0
"""What full and sparse attention cost, in floating-point operations, per stage."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from vsa.stages.inputs import Layout
from vsa.stages.sequences.choice import pools_of
from vsa.values import checks
from vsa.values.budget import Budget, TopK
from vsa.values.grid import Grid
from vsa.values.score import Score, runs_of
from vsa.values.sequence import Segment, Sequence

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

    Raises:
        ValueError, TypeError: naming the argument.
    """
    queries = _sequence(grid)
    keys = queries if kv_grid is None else _sequence(kv_grid)
    each = (
        checks.integer("batch", batch, 1)
        * checks.integer("heads", heads, 1)
        * checks.integer("head_dim", head_dim, 1)
    )
    kept_tiles = kept = 0.0
    choosing = queries.query_tiles
    for places, budget in pools_of(keys, topk, heads):
        of = [keys.segments[place] for place in places]
        tiles = sum(segment.num_tiles for segment in of)
        count = _count(budget, topk)
        kept_tiles += count
        kept += count / tiles * sum(segment.tokens for segment in of)
    left_out = (keys.key_tiles - kept_tiles) * checks.flag("tail", tail)
    factor, linear = 1 + BACKWARD * bool(backward), 1 + bool(backward)
    in_coarse = [[x for x in of.segments if x.coarse] for of in (queries, keys)]
    tile_pairs = _tiles(in_coarse[0]) * _tiles(in_coarse[1])
    averaged = _tokens(in_coarse[0]) + 2 * _tokens(in_coarse[1])
    sparse = _tokens([x for x in queries.segments if x.is_sparse])
    always = _tokens([x for x in keys.segments if not x.competes])
    pairs = sparse * (kept + always) + (queries.length - sparse) * keys.length
    return Flops(
        full=factor * 4 * each * queries.length * keys.length,
        coarse=factor * 4 * each * tile_pairs + linear * each * averaged,
        select=2.0 * each * choosing * keys.key_tiles * runs_of(score) ** 2,
        fine=factor * 4 * each * pairs,
        combine=linear * 3.0 * each * queries.length,
        tail=factor * 4 * each * sparse * left_out,
    )


def _sequence(grid: Layout) -> Sequence:
    return Sequence.of(grid if isinstance(grid, (Grid, Sequence)) else Grid(grid))


def _count(budget: Budget, topk: object) -> float:
    if budget.mass:
        raise ValueError(
            "topk must say how many tiles are kept for their operations to be counted, "
            f"but it is {topk}: pass the density of a selection"
        )
    return fmean(budget.counts)


def _tiles(segments: list[Segment]) -> int:
    return sum(segment.num_tiles for segment in segments)


def _tokens(segments: list[Segment]) -> int:
    return sum(segment.tokens for segment in segments)
