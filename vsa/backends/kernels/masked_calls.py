# SPDX-License-Identifier: Apache-2.0
"""The calls of ``vsa._C`` under a mask over tiles: the plain ones, and the mask.

By a rule, kernels leave out what no query tile may choose: blocks of scores, steps of products, and
means of tiles. By bitmaps they compute all scores and choose among those that are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends.kernels.tensors import Located, address
from vsa.backends.torch_coarse import without_unseen
from vsa.values import bitmap
from vsa.values.tile_mask import TileMask, TileRule

if TYPE_CHECKING:
    from vsa import _C


class LocatedMask(NamedTuple):
    """A mask as kernels are told.

    Attributes:
        rule: a ``TileRule``'s numbers, or none.
        allowed: (heads or 1, n_q, words) int32, or None for a rule.
        query_tiles: n_q.
    """

    rule: Sequence[int]
    allowed: Located | None
    query_tiles: int

    def of_tiles(self) -> _C.MaskOfTiles:
        """For the kernels that look at every tile."""
        from vsa import _C

        heads = 0 if self.allowed is None else self.allowed.shape[0]
        return _C.MaskOfTiles(rule=list(self.rule), allowed=address(self.allowed), mask_heads=heads)


def located(mask: TileMask | None, tiles: int) -> LocatedMask | None:
    """A mask of tensors, for ``tiles`` query tiles."""
    if mask is None:
        return None
    allowed = None if mask.allowed is None else bitmap.pack(mask.allowed).contiguous()
    return LocatedMask(tuple(mask.rule), allowed, tiles)


def clean(mask: TileMask | None, *means: Tensor) -> list[Tensor]:
    """Means of queries and keys, zeros where tiles have no part."""
    if mask is None or (mask.allowed is None and mask.of_tiles.sees_all):
        return list(means)
    return without_unseen(mask, *means)


def means_call(call: _C.TileMeans, rule: Sequence[int], first_of_keys: int) -> Any:
    """Means of tiles, where tensors from ``first_of_keys`` on are of keys."""
    from vsa import _C

    if not len(rule) or TileRule(*rule).sees_all:
        return call
    return _C.MaskedTileMeans(means=call, rule=list(rule), first_of_keys=first_of_keys)


def select_call(
    call: _C.SelectTiles, mask: LocatedMask | None, shares: Sequence[float]
) -> _C.SelectTiles | _C.MaskedSelectTiles:
    """The choice among what rows may choose; ``shares`` as in ``vsa.values.problem.TileScores``."""
    from vsa import _C

    if mask is None:
        return call
    return _C.MaskedSelectTiles(select=call, mask=mask.of_tiles(), shares=list(shares))


def softmax_call(
    call: _C.SoftmaxRows, mask: LocatedMask | None, first_row: int
) -> _C.SoftmaxRows | _C.MaskedSoftmaxRows:
    """The softmax over what rows may choose, from a row on among those of (B, heads, n_q)."""
    from vsa import _C

    if mask is None:
        return call
    return _C.MaskedSoftmaxRows(
        softmax=call, mask=mask.of_tiles(), first_row=first_row, query_tiles=mask.query_tiles
    )


def products_call(
    call: _C.Products, mask: LocatedMask | None, first_query: int, *sides: int
) -> _C.Products | _C.MaskedProducts:
    """Products, each of whose sides stand for queries and keys, from a row of a matrix on."""
    from vsa import _C

    if mask is None or mask.allowed is not None:
        return call
    return _C.MaskedProducts(
        products=call, rule=list(mask.rule), first_query=first_query, sides=list(sides)
    )


def score_gradient_call(
    call: _C.ScoreGradient, mask: LocatedMask | None, first_query: int
) -> _C.ScoreGradient | _C.MaskedScoreGradient:
    """The gradient of scores, from a row of a matrix on."""
    from vsa import _C

    if mask is None or mask.allowed is not None:
        return call
    return _C.MaskedScoreGradient(gradient=call, rule=list(mask.rule), first_query=first_query)


def outside_tail(chosen: Tensor, mask: TileMask | None, tiles: int, columns: int) -> Tensor:
    """Bitmaps of what a tail leaves out: what is chosen, and what may not be.

    Args:
        chosen: (B, heads, n_q, words) int32, contiguous.
        mask: which tiles a row may choose.
        tiles: n_q.
        columns: n_k.
    """
    if mask is None:
        return chosen
    allowed = mask.matrix(tiles, chosen.device)
    assert allowed.shape[-1] == columns and allowed.dtype == torch.bool
    return (chosen | bitmap.pack(~allowed)).contiguous()
