# SPDX-License-Identifier: Apache-2.0
"""What is measured: cases, their inputs, and the orders of tokens that kernels want them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import vsa
from vsa.measure import patterns
from vsa.measure.timing import sets_beyond_cache
from vsa.values import checks
from vsa.values.grid import SLOTS, Extent

Order = Literal["raster", "tiles"]


@dataclass(frozen=True)
class Case:
    """One layer with one sparsity pattern.

    Attributes:
        grid: (T, H, W) tokens, in tiles of 4x4x4.
        heads: query, key and value heads.
        head_dim: channels of a head.
        pattern: one of ``patterns.KINDS``.
        share: of the key tiles that a query tile keeps.
    """

    grid: Extent
    heads: int
    head_dim: int
    pattern: str
    share: float

    @property
    def layer(self) -> tuple[Extent, int, int]:
        """What matters to a dense kernel."""
        return self.grid, self.heads, self.head_dim


class Inputs(NamedTuple):
    """One set of inputs in a kernel's order of tokens.

    raster: (1, S, heads, head_dim) each, as the video lies.
    tiles: (1, heads, tiles * 64, head_dim) each, contiguous; the real tokens of a tile come first,
    zeros behind them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor


class Problem:
    """A case on a device: pattern and sets of random bf16 inputs, the same in every process."""

    def __init__(self, case: Case, device: torch.device, captured: Path | None = None):
        self.case, self.device = case, device
        self.grid = vsa.Grid(case.grid)
        self.scale = case.head_dim**-0.5
        topk = checks.top_k(case.share, self.grid.num_tiles)
        self.selection = patterns.selection(
            case.pattern, self.grid, case.heads, topk, device, captured
        )
        self.topk = topk
        size = 1, self.grid.tokens, case.heads, case.head_dim
        generator = torch.Generator(device).manual_seed(1)
        nbytes = 2 * self.grid.tokens * case.heads * case.head_dim
        make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
        self.sets = [
            Inputs(*(torch.randn(size, **make) for _ in Inputs._fields))
            for _ in range(max(2, sets_beyond_cache(3 * nbytes, device)))
        ]

    @cached_property
    def tile_sizes(self) -> Tensor:
        """Tokens of each tile, (tiles,) int32."""
        return self.grid.tile_sizes(self.device).int()

    @cached_property
    def slot_of_token(self) -> Tensor:
        """Where each token stands in the order of tiles, (S,) int64."""
        tile = self.grid.tile_of_token(self.device)
        order = tile.argsort(stable=True)
        first = self.tile_sizes.cumsum(0) - self.tile_sizes
        place = torch.arange(len(tile), device=self.device) - first[tile[order]]
        return torch.empty_like(tile).index_put_((order,), tile[order] * SLOTS + place)

    def arranged(self, order: Order) -> list[Inputs]:
        """The sets in an order of tokens."""
        if order == "raster":
            return self.sets
        return [Inputs(*(self._to_tiles(x) for x in each)) for each in self.sets]

    def _to_tiles(self, x: Tensor) -> Tensor:
        slots = self.grid.num_tiles * SLOTS
        tiles = x.new_zeros(1, x.shape[2], slots, x.shape[3])
        return tiles.index_copy_(2, self.slot_of_token, x.transpose(1, 2))

    def restored(self, x: Tensor, order: Order) -> Tensor:
        """A result back in raster order: like q (1, S, heads, head_dim), or lse (1, heads, S)."""
        if order == "raster":
            return x
        found = x[:, :, self.slot_of_token]
        return found.transpose(1, 2) if found.ndim == 4 else found

    def flops(self, direction: str, dense: bool) -> float:
        """Products between real tokens of selected tiles; of all tokens for a dense kernel."""
        if dense:
            pairs = float(self.case.heads * self.grid.tokens**2)
        else:
            sizes = self.tile_sizes.double()
            pairs = (sizes[:, None] * sizes * self.selection.mask()).sum().item()
        return pairs * 2 * {"forward": 2, "backward": 5}[direction] * self.case.head_dim

    def fingerprint(self) -> int:
        """A number that differs where pattern or inputs do, to see that kernels had the same."""
        bits = [self.selection.bitmap.flatten()]
        bits += [x.flatten().view(torch.int16) for each in self.sets for x in each]
        total = 0
        for x in bits:
            place = torch.arange(1, len(x) + 1, device=x.device) % 65_521
            total = (31 * total + int((x.long() * place).sum())) % (1 << 61)
        return total
