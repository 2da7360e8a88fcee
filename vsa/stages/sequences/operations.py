# SPDX-License-Identifier: Apache-2.0
"""What attention over sequences computes: tiles and tokens, for ``vsa.flops``."""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

from vsa.stages.inputs import Layout
from vsa.stages.sequences.call import sequence_of
from vsa.stages.sequences.choice import pools_of
from vsa.values.budget import TopK
from vsa.values.sequence import Segment


class Pairs(NamedTuple):
    """Counts of one head.

    Attributes:
        full: pairs of tokens in dense attention.
        fine: pairs of tokens that attend each other.
        coarse: pairs of tiles in the coarse stage.
        scored: pairs of tiles that compete.
        averaged: tokens that go into means, of q once, of k and v each.
        queries: tokens.
    """

    full: float
    fine: float
    coarse: float
    scored: float
    averaged: float
    queries: float


def count(grid: Layout, kv_grid: Layout | None, topk: TopK | None, heads: int) -> Pairs:
    """Of a call; arguments as in ``vsa.flops``.

    Raises:
        ValueError, TypeError: in one sentence that names ``topk``.
    """
    queries = sequence_of(grid)
    keys = queries if kv_grid is None else sequence_of(kv_grid)
    kept = 0.0
    for places, budget in pools_of(keys, topk, heads):
        of = [keys.segments[place] for place in places]
        if budget.mass:
            raise ValueError(
                "topk must say how many tiles are kept for their operations to be counted, but it "
                f"is {topk if of[0].topk is None else of[0].topk}: pass a share of the tiles"
            )
        kept += fmean(budget.counts) / sum(x.num_tiles for x in of) * _tokens(of)
    sparse = _tokens([x for x in queries.segments if x.is_sparse])
    always = _tokens([x for x in keys.segments if not x.competes])
    of_queries, of_keys = ([x for x in of.segments if x.coarse] for of in (queries, keys))
    return Pairs(
        full=queries.length * keys.length,
        fine=sparse * (kept + always) + (queries.length - sparse) * keys.length,
        coarse=sum(x.num_tiles for x in of_queries) * sum(x.num_tiles for x in of_keys),
        scored=queries.query_tiles * keys.key_tiles,
        averaged=_tokens(of_queries) + 2 * _tokens(of_keys),
        queries=queries.length,
    )


def _tokens(segments: list[Segment]) -> int:
    return sum(segment.tokens for segment in segments)
