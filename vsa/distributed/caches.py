# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values for each rank, of the heads that an exchange gives it.

An exchange brings a rank all tokens of the current chunk for its heads, so that its cache holds
these heads and nothing is exchanged for the past. What an exchange does not depend on would be
wrong without a word where caches differ: the chunk that they are at, or their sinks. So ranks
compare their caches at the first call of each chunk.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from vsa.distributed.agreement import agree, can_agree, refuse
from vsa.distributed.shards import Ranks
from vsa.stages import cached, inputs
from vsa.values.grid import Extent, Grid
from vsa.values.kv_cache import KVCache
from vsa.values.selection import Selection

_agreed: weakref.WeakKeyDictionary[KVCache, Hashable] = weakref.WeakKeyDictionary()
"""For each cache, the group and the position that ranks have agreed on last."""
_calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""For each process group, its calls with a cache."""


def grid_of_chunk(
    cache: KVCache,
    q: Tensor,
    grids: tuple[Extent | Grid | None, Extent | Grid | None],
    tile: inputs.Tile,
    mask: object,
    selection: Selection | None,
    ranks: Ranks,
) -> Grid:
    """The grid of the current chunk, with the text before it where ``grid`` says so.

    Args:
        cache: of this rank.
        q: this rank's queries.
        grids: ``grid`` and ``kv_grid`` as given; without a ``vsa.Grid`` no text comes along.
        tile: as given, and so are the next two.
        mask: see tile.
        selection: see tile.
        ranks: of the group.

    Raises:
        ValueError, TypeError: naming what does not go with a cache.
    """
    cached.check_is_cache(cache)
    if ranks.rows > 1:
        raise ValueError(
            "cache must be None on a 2-D group, whose rows hold different queries of a chunk: use "
            "a group of one dimension"
        )
    grid, kv_grid = grids
    cached.check_beside(mask, kv_grid, selection)
    found = cached.grid_under(cache, q, grid, tile)
    return found if isinstance(grid, Grid) else cache.grid_of(0)


def check_kv_heads(cache: KVCache, k: Tensor, own: int, ranks: Ranks) -> None:
    """A cache holds this rank's heads.

    Args:
        cache: of this rank.
        k: this rank's keys, of all heads.
        own: heads of keys on each rank after the exchange.
        ranks: of the group.

    Raises:
        ValueError: it holds another number of them.
    """
    if cache.kv_heads != own:
        raise ValueError(
            f"cache must have kv_heads={own}, what each of the {ranks.columns} ranks of group "
            f"holds of the {k.shape[2]} heads of k, but it has {cache.kv_heads}"
        )


def kind(cache: KVCache) -> Hashable:
    """All of a cache that the checks of a call depend on, but whether its text is there."""
    return *_settings(cache).values(), cache.batch, cache.head_dim, cache.device, cache.past


def agree_on(cache: KVCache, with_text: bool, ranks: Ranks) -> None:
    """Return if the caches of all ranks may be written, and stand at the same chunk.

    Ranks ask each other at the first call of a chunk alone; a graph that is traced asks nothing.

    Args:
        cache: of this rank.
        with_text: whether text comes along.
        ranks: of the group.

    Raises:
        ValueError: no room, text that nobody has written, or caches that differ.
        RuntimeError: a rank that has refused its arguments, or has not come within the timeout.
    """
    if not can_agree():
        return
    try:
        cache.check_room(with_text)
    except ValueError as error:
        refuse(ranks.heads, error)
        raise
    before = _calls.get(ranks.heads, 0)
    here = ranks.heads.group_name, cache.position
    if _agreed.get(cache) != here:
        settings = ", ".join(f"{name}={value}" for name, value in _settings(cache).items())
        # Where exchanges do not hold up the host, a rank that has not advanced comes here a chunk
        # later, with as many chunks as the others but more calls.
        state = f"at chunk {cache.position[1]} with {settings}, after {before} calls with a cache"
        # Again, though the words may be known: they were another cache's, or another video's.
        agree(ranks.heads, {"cache": state}, again=True)
        _agreed[cache] = here
    _calls[ranks.heads] = before + 1


def _settings(cache: KVCache) -> dict[str, Hashable]:
    names = "chunk", "capacity", "sinks", "tile", "prefix", "kv_heads", "dtype"
    return {name: getattr(cache, name) for name in names}
