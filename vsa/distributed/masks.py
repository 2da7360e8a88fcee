# SPDX-License-Identifier: Apache-2.0
"""Masks over tiles where the sequence is sharded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vsa.distributed.shards import Ranks
from vsa.stages import inputs
from vsa.values import checks, masks
from vsa.values.grid import Extent, Grid
from vsa.values.masks import Mask


def common_tile(
    mask: Mask | None, tile: inputs.Tile, grid: Extent | Grid | None, kv_grid: Extent | Grid | None
) -> inputs.Tile:
    """The tile of queries and keys: under a rule "auto" means one for both."""
    masks.check(mask)
    extent = grid if kv_grid is None else kv_grid
    if tile != "auto" or isinstance(extent, Grid) or isinstance(grid, Grid):
        return tile
    return masks.tile_under(mask, checks.extent("grid", extent)) or "auto"


def mask_of_row(
    mask: Mask | None,
    q: Tensor,
    grids: tuple[Grid, Grid, Grid],
    lengths: Sequence[int],
    ranks: Ranks,
) -> Mask | None:
    """The mask of this row's queries. They are not the last frames, so it is a tensor.

    Args:
        mask: of the whole sequence.
        q: this rank's queries, for their heads and device.
        grids: of all queries, of all keys, and of this row's queries.
        lengths: tokens of every rank.
        ranks: of the group.
    """
    whole, keys, mine = grids
    found = masks.resolve(mask, whole, keys, q.shape[2])
    if found is None or ranks.rows == 1:
        return mask
    before = max(0, sum(ranks.per_row(lengths)[: ranks.row]) - whole.prefix)
    _, height, width = whole.tiles
    layer = before // (whole.shape[1] * whole.shape[2]) // whole.box[0]
    first = layer * height * width
    return found.matrix(whole.num_tiles, q.device)[:, first : first + mine.num_tiles].contiguous()
