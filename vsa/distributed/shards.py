# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which tokens of the sequence, checked before anything is communicated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from vsa.values import checks
from vsa.values.grid import Grid


@dataclass(frozen=True)
class Ranks:
    """Ranks in the order of the sequence, as rows of ranks that share out heads.

    Attributes:
        heads: process group of this rank's row, whose ranks share out the heads.
        queries: process group of this rank's column, whose ranks share out the queries; None for
            one row.
        columns: ranks in a row.
        rows: number of rows.
        rank: this rank's place, row * columns + column.
    """

    heads: Any
    queries: Any
    columns: int
    rows: int
    rank: int

    @property
    def row(self) -> int:
        """This rank's row."""
        return self.rank // self.columns

    def of_row(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The tokens of the ranks of this row."""
        return tuple(lengths[self.row * self.columns : (self.row + 1) * self.columns])

    def per_row(self, lengths: Sequence[int]) -> list[int]:
        """The tokens of every row."""
        return [sum(lengths[i : i + self.columns]) for i in range(0, len(lengths), self.columns)]


def ranks_of(group: Any) -> Ranks:
    """The ranks of a process group, or of a mesh of one or two dimensions.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: something else, or a mesh of more dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group needs torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group first, or start with torchrun"
        )
    if group is None or isinstance(group, dist.ProcessGroup):
        heads = dist.group.WORLD if group is None else group
        return Ranks(heads, None, dist.get_world_size(heads), 1, dist.get_rank(heads))
    if not isinstance(group, DeviceMesh):
        raise TypeError(
            "group must be a process group, a DeviceMesh or None, but it is of type "
            f"{type(group).__name__}"
        )
    if group.ndim == 1:
        return ranks_of(group.get_group())
    if group.ndim != 2:
        raise ValueError(
            "group as a DeviceMesh must have one dimension (heads) or two (queries, heads), but it "
            f"has {group.ndim}: pass a slice of it"
        )
    rows, columns = group.shape
    rank = group.get_local_rank(0) * columns + group.get_local_rank(1)
    return Ranks(group.get_group(1), group.get_group(0), columns, rows, rank)


def lengths_of(name: str, lengths: object, length: int, ranks: Ranks) -> list[int]:
    """The tokens of every rank: as given, or shares that differ by one token at most.

    Raises:
        TypeError, ValueError: naming ``name``.
    """
    if lengths is None:
        return even_shares(length, ranks.columns * ranks.rows)
    if not isinstance(lengths, (tuple, list)):
        raise TypeError(
            f"{name} must be a tuple or list of token counts, but it is {lengths!r:.60}"
        )
    counts = [checks.integer(f"{name}[{r}]", n, at_least=1) for r, n in enumerate(lengths)]
    if len(counts) != ranks.columns * ranks.rows or sum(counts) != length:
        raise ValueError(
            f"{name} must be {ranks.columns * ranks.rows} token counts, one per rank, that add up "
            f"to the {length} tokens of the grid, but they are {counts}, in all {sum(counts)}"
        )
    return counts


def rows_by_layers(grid: Grid, ranks: Ranks) -> list[int]:
    """Tokens of every rank where rows take whole layers of tiles along t, as even as can be."""
    layer = grid.box[0] * grid.shape[1] * grid.shape[2]
    ends = [
        min(end * layer, grid.tokens) for end in accumulate(even_shares(grid.tiles[0], ranks.rows))
    ]
    ends = [end + grid.prefix for end in ends[:-1]] + [grid.length]
    starts = [0, *ends[:-1]]
    return [
        n
        for start, end in zip(starts, ends, strict=True)
        for n in even_shares(end - start, ranks.columns)
    ]


def grid_of_row(grid: Grid, lengths: Sequence[int], ranks: Ranks) -> Grid:
    """The grid of the queries of this rank's row.

    Raises:
        ValueError: naming ``lengths``, where a row would cut through tiles, on any rank alike.
    """
    if ranks.rows == 1:
        return grid
    plane = grid.shape[1] * grid.shape[2]
    ends = [end - grid.prefix for end in accumulate(ranks.per_row(lengths))][:-1]
    layers = [end // plane for end in ends]
    allowed = range(grid.box[0], grid.shape[0], grid.box[0])
    if any(end % plane or end // plane not in allowed for end in ends) or layers != sorted(
        set(layers)
    ):
        raise ValueError(
            f"lengths must give every row of the 2-D group whole layers of tiles, {grid.box[0]} of "
            f"the grid's {grid.shape[0]} frames or a multiple, but its rows end after "
            f"{[end / plane for end in ends]} frames"
        )
    bounds = [0, *layers, grid.shape[0]]
    first, last = bounds[ranks.row], bounds[ranks.row + 1]
    return replace(
        grid,
        shape=(last - first, *grid.shape[1:]),
        tile=grid.box,  # of the whole grid: "auto" must not choose again
        prefix=grid.prefix if ranks.row == 0 else 0,
        suffix=grid.suffix if ranks.row == ranks.rows - 1 else 0,
    )


def even_shares(count: int, parts: int) -> list[int]:
    """As torch.tensor_split."""
    return [count // parts + (part < count % parts) for part in range(parts)]
