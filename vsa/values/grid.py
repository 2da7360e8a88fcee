# SPDX-License-Identifier: Apache-2.0
"""grid: cut a (T, H, W) token grid into tiles. No token moves; a tile is an address pattern.

Paper, section 2.2: the latent video is cut into cubes; here the cubes at the edges are clipped,
never padded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from vsa.values import checks

SLOTS = 64
"""Most tokens that one tile holds: the rows of one tensor-core operand."""

Extent = tuple[int, int, int]
"""Three token counts along (t, h, w)."""


@dataclass(frozen=True)
class Grid:
    """A video's tokens as tiles, with text tokens before and after them in the sequence.

    Tiles are ordered t-major, then h, then w; tokens inside a tile in raster order (w fastest).

    Args:
        shape: (T, H, W), tokens along each axis.
        tile: tokens per tile along (t, h, w), at most 64 in all; ``"auto"`` takes
            ``best_tile(shape)``.
        prefix: text tokens that stand before the video in the sequence.
        suffix: text tokens that stand after it.

    Raises:
        ValueError, TypeError: an extent, tile or count that is not allowed; the sentence names it.
    """

    _most_tokens: ClassVar[int] = SLOTS

    shape: Extent
    tile: Extent | Literal["auto"] = (4, 4, 4)
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        shape = checks.extent("grid", self.shape)
        if self.tile == "auto":
            T, H, W = map(operator.index, shape)  # compiled code makes a graph for each of these
            tile = best_tile((T, H, W))
        else:
            tile = checks.tile("tile", self.tile, self._most_tokens)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "prefix", checks.integer("prefix", self.prefix, at_least=0))
        object.__setattr__(self, "suffix", checks.integer("suffix", self.suffix, at_least=0))

    @property
    def tokens(self) -> int:
        """Video tokens, T * H * W."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def text(self) -> int:
        """Text tokens, prefix + suffix."""
        return self.prefix + self.suffix

    @property
    def length(self) -> int:
        """Tokens of the whole sequence: prefix, video, suffix."""
        return self.prefix + self.tokens + self.suffix

    @property
    def box(self) -> Extent:
        """The tile clipped to the grid: what the largest tile spans along (t, h, w)."""
        (T, H, W), (t, h, w) = self.shape, cast("Extent", self.tile)
        return min(t, T), min(h, H), min(w, W)

    @property
    def tiles(self) -> Extent:
        """Tiles along each axis, (nt, nh, nw)."""
        return _tiles_along(self.shape, cast("Extent", self.tile))

    @property
    def num_tiles(self) -> int:
        """Tiles in all, nt * nh * nw."""
        nt, nh, nw = _tiles_along(self.shape, cast("Extent", self.tile))
        return nt * nh * nw

    @property
    def query_tiles(self) -> int:
        """Tiles that choose, rows of a choice: all of them."""
        return self.num_tiles

    @property
    def key_tiles(self) -> int:
        """Tiles that are chosen among, columns of a choice: all of them."""
        return self.num_tiles

    @property
    def is_ragged(self) -> bool:
        """Whether some tile is clipped at an edge."""
        return any(extent % size for size, extent in zip(self.box, self.shape, strict=True))

    @property
    def waste(self) -> float:
        """Share of the 64 slots per tile that hold no token."""
        return 1 - self.tokens / (SLOTS * self.num_tiles)

    @property
    def sizes(self) -> Tensor:
        """Tokens of each tile, (num_tiles,) int64 on the CPU."""
        return self.tile_sizes()

    def tile_sizes(self, device: torch.device | str | None = None) -> Tensor:
        """Tokens of each tile, (num_tiles,) int64 on ``device``."""
        t, h, w = (
            (extent - size * torch.arange(count, device=device)).clamp(max=size)
            for extent, size, count in zip(self.shape, self.box, self.tiles, strict=True)
        )
        return (t[:, None, None] * h[:, None] * w).flatten()

    def tile_of_token(self, device: torch.device | str | None = None) -> Tensor:
        """The tile that each video token lies in, (tokens,) int64."""
        (T, H, W), (t, h, w), (_, nh, nw) = self.shape, self.box, self.tiles
        layer, row, column = (
            torch.arange(T, device=device) // t,
            torch.arange(H, device=device) // h,
            torch.arange(W, device=device) // w,
        )
        return ((layer[:, None, None] * nh + row[:, None]) * nw + column).flatten()

    def tokens_of_tiles(self, device: torch.device | str | None = None) -> Tensor:
        """Video token in every slot, (num_tiles, volume of ``box``) int64; -1 where clipped."""
        axes = [
            torch.arange(count, device=device)[:, None] * size + torch.arange(size, device=device)
            for size, count in zip(self.box, self.tiles, strict=True)
        ]
        t, h, w = (
            axes[0][:, None, None, :, None, None],
            axes[1][:, None, None, :, None],
            axes[2][:, None, None],
        )
        inside = (t < self.shape[0]) & (h < self.shape[1]) & (w < self.shape[2])
        token = (t * self.shape[1] + h) * self.shape[2] + w
        return torch.where(inside, token, -1).reshape(self.num_tiles, -1)

    def to_tiles(self, x: Tensor) -> Tensor:
        """Copy a sequence into tile order: for reading and tests, the kernels never need it.

        Args:
            x: (B, length, ...); text tokens are left out.

        Returns:
            (B, num_tiles, 64, ...), zeros in slots without a token.
        """
        self.check_length("x", x.shape[1])
        token = self.tokens_of_tiles(x.device)
        rows = x[:, self.prefix + token.clamp(min=0)]
        rows = rows.masked_fill((token < 0).view(1, *token.shape, *[1] * (x.ndim - 2)), 0)
        tiles = x.new_zeros(x.shape[0], self.num_tiles, SLOTS, *x.shape[2:])
        tiles[:, :, : token.shape[1]] = rows
        return tiles

    def from_tiles(self, x: Tensor) -> Tensor:
        """Copy tile order back into the sequence, the inverse of ``to_tiles``.

        Args:
            x: (B, num_tiles, 64, ...).

        Returns:
            (B, length, ...), zeros at text tokens.
        """
        if x.ndim < 3 or x.shape[1:3] != (self.num_tiles, SLOTS):
            raise ValueError(
                f"x has the shape {tuple(x.shape)}, but this grid's tiles are (B, "
                f"{self.num_tiles}, {SLOTS}, ...)"
            )
        token = self.tokens_of_tiles(x.device)
        slot = torch.arange(self.num_tiles, device=x.device)[:, None] * SLOTS + torch.arange(
            token.shape[1], device=x.device
        )
        slot_of_token = slot.new_empty(self.tokens + 1).index_put_((token,), slot)[:-1]
        sequence = x.new_zeros(x.shape[0], self.length, *x.shape[3:])
        sequence[:, self.prefix : self.prefix + self.tokens] = x.flatten(1, 2)[:, slot_of_token]
        return sequence

    def check_length(self, name: str, length: int, source: str = "its grid") -> None:
        """A sequence is as long as this grid.

        Args:
            name: of the argument that the sequence belongs to.
            length: its tokens.
            source: where this grid comes from, for the sentence.

        Raises:
            ValueError: it is longer or shorter.
        """
        if length != self.length:
            raise ValueError(
                f"{name} has {length} tokens in its sequence, but {source} has {self.length}: "
                f"prefix {self.prefix} + {self.shape[0]}*{self.shape[1]}*{self.shape[2]} "
                f"video + suffix {self.suffix}"
            )

    def as_ints(self) -> list[int]:
        """Eight ints (T, H, W, t, h, w, prefix, suffix), the form that operators take."""
        return [*self.shape, *self.tile, self.prefix, self.suffix]

    @staticmethod
    def from_ints(ints: Sequence[int]) -> Grid:
        """The inverse of ``as_ints``; extents that are symbols while tracing stay symbols."""
        if any(isinstance(number, torch.SymInt) for number in ints):  # a hash would fix them
            T, H, W, t, h, w, prefix, suffix = ints
            return Grid((T, H, W), (t, h, w), prefix, suffix)
        return _grid_of_ints(*ints)


@lru_cache(maxsize=256)
def _grid_of_ints(T: int, H: int, W: int, t: int, h: int, w: int, prefix: int, suffix: int) -> Grid:
    """Operators ask for the grid of a layer again in every call."""
    return Grid((T, H, W), (t, h, w), prefix, suffix)


def best_tile(shape: Extent, frames: int | None = None) -> Extent:
    """The tile shape that wastes the fewest of its 64 slots on a grid of (T, H, W) tokens.

    Only compact shapes are considered: a side is at most twice any side that does not span its
    whole axis, since neighbouring tokens are what makes a tile's mean meaningful. Ties go to the
    shortest longest side.

    Args:
        shape: (T, H, W), tokens along each axis.
        frames: of a chunk, where no tile may lie in two of them (``vsa.masks.ChunkCausal``): only
            extents along t that divide it are considered.

    Returns:
        Tokens per tile along (t, h, w). Without ``frames`` it never wastes more than (4, 4, 4).
    """
    shape = checks.extent("shape", shape)
    tiles = _compact_tiles(shape)
    if frames is not None:
        frames = checks.integer("frames", frames, at_least=1)
        # An axis that a chunk spans is spanned.
        chunk = min(frames, shape[0]), shape[1], shape[2]
        tiles = (tile for tile in _compact_tiles(chunk) if frames % tile[0] == 0)
    best = min((math.prod(_tiles_along(shape, tile)), max(tile), tile) for tile in tiles)
    return best[2]


# What torch.compiler.assume_constant_result sets, which would load torch._dynamo: the tile is found
# when code is traced.
best_tile._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tiles_along(shape: Extent, tile: Extent) -> Extent:
    (T, H, W), (t, h, w) = shape, tile
    return -(-T // t), -(-H // h), -(-W // w)


def _compact_tiles(shape: Extent) -> Iterator[Extent]:
    for t in range(1, min(shape[0], SLOTS) + 1):
        for h in range(1, min(shape[1], SLOTS // t) + 1):
            for w in range(1, min(shape[2], SLOTS // (t * h)) + 1):
                tile = (t, h, w)
                inner = [size for size, extent in zip(tile, shape, strict=True) if size < extent]
                if not inner or max(tile) <= 2 * min(inner):
                    yield tile
