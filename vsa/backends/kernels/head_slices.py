# SPDX-License-Identifier: Apache-2.0
"""Heads whose keys and values are in eight bits at a time, so that few bytes are held."""

from __future__ import annotations

import math
from functools import lru_cache

from vsa.backends.kernels.tensors import Located, text_tiles
from vsa.values.grid import Grid

MOST_HELD = 0.15
"""Of the bytes of q, k and v: what tiles in eight bits take at a time, if a head's take less."""


def head_slices(q: Located, k: Located, grids: tuple[Grid, Grid], blocks: int) -> list[slice]:
    """Key heads of a batch element that are taken together, in order.

    Args:
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        grids: of the queries and of the keys.
        blocks: of the forward kernel that run at a time.
    """
    from vsa import _C

    (grid, kv_grid), kv_heads = grids, k.shape[2]
    tiles, key_tiles = (each.num_tiles + text_tiles(each) for each in (grid, kv_grid))
    given = sum(math.prod(x.shape) * x.element_size() for x in (q, k, k))
    most = int(MOST_HELD * given / (key_tiles * _C.quantised_tile_bytes(q.shape[3])))
    work = _C.low_precision_work_tiles(q.shape[3], tiles) * (q.shape[2] // kv_heads)
    slices, first = [], 0
    for heads in sizes(kv_heads, max(1, most), work, blocks):
        slices.append(slice(first, first + heads))
        first += heads
    return slices


@lru_cache(maxsize=256)
def sizes(heads: int, most: int, work: int, blocks: int) -> tuple[int, ...]:
    """How many heads each slice has, largest first: those that end soonest.

    A launch ends with blocks that wait for the last ones. So what counts are rounds, in which each
    block does one work tile, and a quarter of a round for each launch.

    Args:
        heads: all of them.
        most: of a slice.
        work: work tiles of a head.
        blocks: that do a work tile each at a time.
    """
    found: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for count in range(1, heads + 1):
        found.append(
            min(
                (found[count - last][0] + 4 * -(-last * work // blocks) + 1,
                 (*found[count - last][1], last))
                for last in range(1, min(most, count) + 1)
            )
        )  # fmt: skip
    return tuple(sorted(found[heads][1], reverse=True))
