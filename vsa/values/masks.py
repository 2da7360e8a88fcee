# SPDX-License-Identifier: Apache-2.0
"""Masks over tiles as a user writes them, and what they come to on the tiles of two grids."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa.values import checks
from vsa.values.grid import Extent, Grid, best_tile
from vsa.values.tile_mask import TileMask, TileRule


@dataclass(frozen=True)
class ChunkCausal:
    """Chunks of frames that see themselves and what came before: autoregressive video.

    Frame t lies in chunk t // frames; the last chunk may be shorter. A query tile may choose key
    tiles of its own chunk and of earlier ones: of the last ``window`` chunks, its own included, and
    of the first ``sinks`` chunks. Where the keys have more frames than the queries, the queries are
    the last ones: the same mask serves training and a chunk over its past.

    Args:
        frames: latent frames of a chunk. The tile's extent along t must divide it.
        window: chunks that are seen, the own one included; None for all.
        sinks: first chunks that are seen from everywhere after them.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    frames: int
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", checks.integer("frames", self.frames, at_least=1))
        if self.window is not None:
            object.__setattr__(self, "window", checks.integer("window", self.window, at_least=1))
        object.__setattr__(self, "sinks", checks.count("sinks", self.sinks))

    def unit(self, shape: Extent) -> int:
        """Frames that a tile's extent along t must divide, for keys of (T, H, W) tokens."""
        return self.frames

    def on(self, grid: Grid, kv_grid: Grid) -> TileRule:
        """The rule on the tiles of these grids, which are checked."""
        return _layers(self, grid, kv_grid)._replace(
            chunk=max(1, self.frames // kv_grid.box[0]), window=self.window or 0, sinks=self.sinks
        )


@dataclass(frozen=True)
class TeacherForcing:
    """Two videos of T / 2 frames after each other along t, the clean one first: teacher forcing.

    Clean chunks see clean chunks up to their own. A noisy chunk sees itself, and the clean chunks
    strictly before it.

    Args:
        frames: latent frames of a chunk. The tile's extent along t must divide it, and those of
            each video.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", checks.integer("frames", self.frames, at_least=1))

    def unit(self, shape: Extent) -> int:
        """See ``ChunkCausal.unit``; a tile must not lie in both videos either."""
        if shape[0] % 2:
            raise ValueError(
                "mask TeacherForcing needs two videos of as many frames along t, but the grid has "
                f"{shape[0]} frames"
            )
        return math.gcd(self.frames, shape[0] // 2)

    def on(self, grid: Grid, kv_grid: Grid) -> TileRule:
        """See ``ChunkCausal.on``."""
        if grid.shape[0] != kv_grid.shape[0]:
            raise ValueError(
                "mask TeacherForcing needs keys with the frames of the queries, but kv_grid has "
                f"{kv_grid.shape[0]} frames and grid has {grid.shape[0]}"
            )
        rule = _layers(self, grid, kv_grid)
        return rule._replace(chunk=self.frames // grid.box[0], clean=rule.key_layers // 2)


@dataclass(frozen=True)
class Window:
    """Key tiles within so many tiles of the query tile's own place along t, h and w.

    ``Window((0, 0, 0))`` leaves a tile with itself alone, ``Window((1, 1, 1))`` with its 26
    neighbours as well. Where the keys have more frames than the queries, the queries are the last.

    Args:
        reach: tiles along (t, h, w), counted to either side.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    reach: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.reach, (tuple, list)) or len(self.reach) != 3:
            raise TypeError(f"reach must be three tile counts (t, h, w), but it is {self.reach!r}")
        each = zip("thw", self.reach, strict=True)
        reach = tuple(checks.count(f"reach along {axis}", value) for axis, value in each)
        object.__setattr__(self, "reach", reach)

    def on(self, grid: Grid, kv_grid: Grid) -> TileRule:
        """See ``ChunkCausal.on``."""
        t, h, w = self.reach
        return _layers(self, grid, kv_grid)._replace(reach_t=t, reach_h=h, reach_w=w)


Rule = ChunkCausal | TeacherForcing | Window
RULES = (ChunkCausal, TeacherForcing, Window)
Mask = Rule | Tensor
"""What ``mask`` may be; a tensor is (n_q, n_k) or (heads, n_q, n_k) bool."""


def check(mask: object) -> None:
    """Refuse what is no mask on any grid.

    Raises:
        TypeError: in one sentence that names ``mask``.
    """
    if mask is None or isinstance(mask, RULES):
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        names = ", ".join(f"vsa.masks.{rule.__name__}" for rule in RULES)
        raise TypeError(f"mask must be one of {names} or a bool tensor, but it is {kind}")


def tile_under(mask: object, shape: Extent) -> Extent | None:
    """The tile that "auto" takes under a rule, for keys of (T, H, W) tokens; None without one."""
    T, H, W = map(operator.index, shape)  # compiled code makes a graph for each of these
    if isinstance(mask, (ChunkCausal, TeacherForcing)):
        t, h, w = best_tile((T, H, W), frames=mask.unit((T, H, W)))
    elif isinstance(mask, Window):
        t, h, w = best_tile((T, H, W))
    else:
        return None
    # Sums, since torch.compile does not ask for the type of what a constant function returned.
    return t + 0, h + 0, w + 0


def resolve(mask: object, grid: Grid, kv_grid: Grid, heads: int) -> TileMask | None:
    """What a mask comes to on these grids.

    Raises:
        ValueError, TypeError: in one sentence that names ``mask``, ``tile`` or ``kv_grid``.
    """
    check(mask)
    if mask is None:
        return None
    if isinstance(mask, RULES):
        return TileMask(tuple(mask.on(grid, kv_grid)))
    assert isinstance(mask, Tensor)
    tiles = grid.num_tiles, kv_grid.num_tiles
    if tuple(mask.shape) not in (tiles, (heads, *tiles), (1, *tiles)):
        raise ValueError(
            f"mask must be (n_q, n_k) = {tiles} or (heads, n_q, n_k) = {(heads, *tiles)}, but its "
            f"shape is {tuple(mask.shape)}"
        )
    return TileMask((), mask if mask.ndim == 3 else mask[None])


def _layers(mask: Rule, grid: Grid, kv_grid: Grid) -> TileRule:
    """The two grids of a rule, whose tiles must be the same boxes of the same video."""
    name = type(mask).__name__
    if grid.shape[1:] != kv_grid.shape[1:]:
        raise ValueError(
            f"mask {name} needs keys with the height and width of the queries, but kv_grid is "
            f"{kv_grid.shape} and grid is {grid.shape}"
        )
    past = kv_grid.shape[0] - grid.shape[0]
    if past < 0:
        raise ValueError(
            f"mask {name} needs the queries to be the last frames of the keys, but kv_grid has "
            f"{kv_grid.shape[0]} frames and grid has {grid.shape[0]}"
        )
    if not isinstance(mask, Window):
        _check_straddling(mask, kv_grid)
    same = grid.box[1:] == kv_grid.box[1:] and min(kv_grid.box[0], grid.shape[0]) == grid.box[0]
    if not same or past % kv_grid.box[0]:
        raise ValueError(
            f"tile must cut queries and keys at the same frames under mask {name}, but it is "
            f"{grid.tile} for the queries and {kv_grid.tile} for the keys, which have {past} "
            "frames more"
        )
    layers, height, width = kv_grid.tiles
    return TileRule(grid.tiles[0], layers, height, width, offset=past // kv_grid.box[0])


def _check_straddling(mask: ChunkCausal | TeacherForcing, grid: Grid) -> None:
    """No tile lies in two chunks."""
    unit = mask.unit(grid.shape)
    alone = grid.tiles[0] == 1 and isinstance(mask, ChunkCausal) and grid.shape[0] <= unit
    if unit % grid.box[0] == 0 or alone:
        return
    between = "" if unit == mask.frames else f", and the {grid.shape[0] // 2} of each video"
    raise ValueError(
        f"tile must have an extent along t that divides the {mask.frames} frames of a chunk"
        f"{between}, but {grid.tile} straddles two of them: {best_tile(grid.shape, frames=unit)} "
        "does not"
    )
