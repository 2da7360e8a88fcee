# SPDX-License-Identifier: Apache-2.0
"""Which key tiles a query tile may choose, as operators and kernels are told: a few whole numbers.

Every rule of ``vsa.masks`` is of one form. A layer is the tiles of one place along t. A query tile
may choose key tiles of two runs of layers, which do not meet, and of those near it along h and w:
``csrc/kernels/select/tile_rule.h`` has the same arithmetic. Masks that are no rule are tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NO_LIMIT = -1
ROWS_AT_ONCE_BYTES = 8 << 20
"""Of the masks of some rows, where those of all would be many."""


class TileRule(NamedTuple):
    """A rule on the tiles of two grids, which have the same tiles along h and w.

    Attributes:
        query_layers: tiles of the queries along t.
        key_layers: tiles of the keys along t.
        height: tiles along h.
        width: tiles along w.
        offset: layer of the keys at which the queries begin.
        chunk: layers of a chunk, 0 without chunks.
        window: chunks that are seen, the own one included, 0 for all.
        sinks: first chunks that are always seen.
        clean: layers of the clean video before the noisy one, 0 for a single video.
        reach_t: layers before and after the own one that are seen; NO_LIMIT for all, and so are
            ``reach_h`` and ``reach_w``.
        reach_h: the same along h.
        reach_w: the same along w.
    """

    query_layers: int
    key_layers: int
    height: int
    width: int
    offset: int = 0
    chunk: int = 0
    window: int = 0
    sinks: int = 0
    clean: int = 0
    reach_t: int = NO_LIMIT
    reach_h: int = NO_LIMIT
    reach_w: int = NO_LIMIT

    @property
    def num_query_tiles(self) -> int:
        """n_q."""
        return self.query_layers * self.height * self.width

    @property
    def num_key_tiles(self) -> int:
        """n_k."""
        return self.key_layers * self.height * self.width

    @property
    def sees_all(self) -> bool:
        """Whether some query tile may choose each key tile, as far as is plain."""
        # Where queries and keys are the same tiles each may choose itself.
        limited = self.window > 0 or self.reach_t != NO_LIMIT
        return self.query_layers == self.key_layers or not limited

    def spans(self, layer: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Two runs of the keys' layers that the queries of some layers may choose.

        Args:
            layer: layers of the queries, counted by those of the keys.

        Returns:
            First layer and the one after the last, of each run; a run may be empty.
        """
        none = torch.zeros_like(layer)
        if self.reach_t != NO_LIMIT:
            first, after = layer - self.reach_t, layer + self.reach_t + 1
            return (none, none), (first.clamp(min=0), after.clamp(max=self.key_layers))
        if not self.chunk:
            return (none, none), (none, none + self.key_layers)
        own = (layer % self.clean if self.clean else layer) // self.chunk * self.chunk
        if self.clean:
            noisy = layer >= self.clean
            after_own = (own + self.chunk).clamp(max=self.clean)
            return (
                (none, torch.where(noisy, own, after_own)),
                (
                    torch.where(noisy, self.clean + own, 0),
                    torch.where(noisy, self.clean + after_own, 0),
                ),
            )
        first = none
        if self.window:
            first = (own - (self.window - 1) * self.chunk).clamp(min=0)
        sinks = first.clamp(max=self.sinks * self.chunk)
        return (none, sinks), (first, (own + self.chunk).clamp(max=self.key_layers))

    def rows(self, tile: Tensor) -> Tensor:
        """Which key tiles some query tiles may choose, (...) -> (..., n_k) bool."""
        plane = self.height * self.width
        at = torch.arange(self.num_key_tiles, device=tile.device)
        tile = tile.unsqueeze(-1)
        one, other = self.spans(tile // plane + self.offset)
        layer = at // plane
        allowed = (layer >= one[0]) & (layer < one[1]) | (layer >= other[0]) & (layer < other[1])
        if self.reach_h != NO_LIMIT:
            allowed &= _near(tile // self.width, at // self.width, self.height, self.reach_h)
        if self.reach_w != NO_LIMIT:
            allowed &= _near(tile, at, self.width, self.reach_w)
        return allowed

    def seen(self, device: torch.device | None = None) -> Tensor:
        """Key tiles that some query tile may choose, (n_k,) bool."""
        # Along h and w a tile is always near the one in its own place.
        plane = self.height * self.width
        layer = torch.arange(self.query_layers, device=device)[:, None] + self.offset
        one, other = self.spans(layer)
        at = torch.arange(self.key_layers, device=device)
        seen = (at >= one[0]) & (at < one[1]) | (at >= other[0]) & (at < other[1])
        return seen.any(0).repeat_interleave(plane)


def _near(tile: Tensor, at: Tensor, extent: int, reach: int) -> Tensor:
    return (tile % extent - at % extent).abs() <= reach


class TileMask(NamedTuple):
    """A rule, or a tensor.

    Attributes:
        rule: a ``TileRule``'s numbers, or none.
        allowed: (heads or 1, n_q, n_k) bool, or None for a rule.
    """

    rule: Sequence[int] = ()
    allowed: Tensor | None = None

    @property
    def of_tiles(self) -> TileRule:
        """The rule, where there is one."""
        return TileRule(*self.rule)

    def rows(self, head: Tensor, tile: Tensor) -> Tensor:
        """Which key tiles query tiles of some heads may choose, (rows,) each: (rows, n_k) bool."""
        if self.allowed is None:
            return self.of_tiles.rows(tile)
        return self.allowed[head % len(self.allowed), tile]

    def matrix(self, tiles: int, device: torch.device | None) -> Tensor:
        """Of all rows, (heads or 1, n_q, n_k) bool."""
        if self.allowed is not None:
            return self.allowed
        return self.of_tiles.rows(torch.arange(tiles, device=device))[None]

    def seen(self, kv_heads: int, device: torch.device) -> Tensor:
        """Key tiles that some query tile may choose, (kv_heads or 1, n_k) bool.

        Values in the others reach nothing.
        """
        if self.allowed is None:
            return self.of_tiles.seen(device)[None]
        by_head = self.allowed.any(1)
        if len(by_head) == 1:
            return by_head
        return by_head.unflatten(0, (kv_heads, -1)).any(1)

    def choosing(self) -> Tensor | None:
        """Query tiles that may choose something, (heads or 1, n_q) bool; None where all may."""
        return None if self.allowed is None else self.allowed.any(-1)

    def counts(self, tiles: int) -> Iterator[Tensor]:
        """Key tiles that query tiles may choose, (heads or 1, some of them) int64, in order."""
        if self.allowed is not None:
            yield self.allowed.sum(-1)
            return
        rule = self.of_tiles
        step = max(1, ROWS_AT_ONCE_BYTES // rule.num_key_tiles)
        for first in range(0, tiles, step):
            yield rule.rows(torch.arange(first, min(first + step, tiles))).sum(-1)[None]


def mask_of(rule: Sequence[int], allowed: Tensor | None) -> TileMask | None:
    """From an operator's arguments."""
    return TileMask(rule, allowed) if len(rule) or allowed is not None else None


def spend(allowed: Tensor, counts: Tensor, shares: Tensor) -> Tensor:
    """Least tiles of rows that may choose so many.

    Args:
        allowed: (rows, 1) int64, tiles that each may choose.
        counts: (rows, 1) int64, a budget as a number.
        shares: (rows, 1) fp64, a budget as a share of ``allowed``, 0 where it is a number.
    """
    of_share = (allowed * shares).ceil().to(allowed.dtype).clamp(min=1)
    return torch.minimum(torch.where(shares > 0, of_share, counts), allowed)
