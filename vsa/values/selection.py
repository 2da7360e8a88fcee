# SPDX-License-Identifier: Apache-2.0
"""A selection: which key tiles each query tile attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vsa.values import transforms
from vsa.values.bitmap import count, pack, unpack
from vsa.values.grid import Extent, Grid
from vsa.values.masks import Mask
from vsa.values.sequence import Sequence
from vsa.values.tile_mask import TileMask

_measures: dict[str, Callable[..., Tensor]] = {}
"""What computes a selection's own methods: measuring lies above values, and enters itself here."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Which key tiles each query tile attends, for every batch element and query head.

    Attributes:
        bitmap: (B, heads, n_q, words) int32; bit j % 32 of word j // 32 is key tile j, spare bits
            are zero.
        num_key_tiles: n_k.
        grid: the queries' grid, where known.
        kv_grid: the keys' grid, where known.
        most: the most tiles that a row keeps, where known without looking at the bitmap.
        under: the mask that it was chosen under. Whoever reuses the selection gets the coarse
            branch and the tail of that mask, too.
        sequences: of the queries and of the keys, where these are no grids: rows are the tiles
            whose queries are sparse, columns those that compete.
    """

    bitmap: Tensor
    num_key_tiles: int
    grid: Grid | None = None
    kv_grid: Grid | None = None
    most: int | None = None
    under: TileMask | None = None
    sequences: tuple[Sequence, Sequence] | None = None

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        grid: Grid | Sequence | None = None,
        kv_grid: Grid | Sequence | None = None,
    ) -> Selection:
        """Pack a bool mask (B, heads, n_q, n_k).

        Raises:
            TypeError, ValueError: a mask of another type or rank, or one that does not fit the
                grids.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor (B, heads, n_q, n_k), but it is {kind}")
        if mask.ndim != 4 or 0 in mask.shape:
            raise ValueError(
                "mask must be (B, heads, n_q, n_k) and not empty, but its shape is "
                f"{tuple(mask.shape)}"
            )
        kv_grid = kv_grid or grid
        for name, axis, tiles in (
            ("grid", 2, None if grid is None else grid.query_tiles),
            ("kv_grid", 3, None if kv_grid is None else kv_grid.key_tiles),
        ):
            if tiles is not None and tiles != mask.shape[axis]:
                raise ValueError(
                    f"mask has {mask.shape[axis]} tiles on axis {axis}, but {name} has {tiles}"
                )
        bits, columns = pack(mask), mask.shape[-1]
        if isinstance(grid, Sequence) or isinstance(kv_grid, Sequence):
            if grid is None or kv_grid is None:
                raise ValueError("grid must be given beside a kv_grid that is a vsa.Sequence")
            return cls(bits, columns, sequences=(Sequence.of(grid), Sequence.of(kv_grid)))
        return cls(bits, columns, grid, kv_grid)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, n_q, n_k)."""
        batch, heads, rows, _ = self.bitmap.shape
        return batch, heads, rows, self.num_key_tiles

    def mask(self) -> Tensor:
        """(B, heads, n_q, n_k) bool."""
        return unpack(self.bitmap, self.num_key_tiles)

    @property
    def density(self) -> float:
        """Mean share of the key tiles that a query tile keeps. Reading it waits for the device."""
        rows = max(1, self.bitmap[..., 0].numel())
        return count(self.bitmap).sum().item() / (rows * self.num_key_tiles)

    def transpose(self) -> Selection:
        """Which query tiles each key tile is attended by: the direction that the backward walks."""
        return Selection(pack(self.mask().mT), self.shape[2], self.kv_grid, self.grid)

    def to(self, device: torch.device | str) -> Selection:
        """The same selection on another device."""
        under = self.under
        if under is not None and under.allowed is not None:
            under = under._replace(allowed=under.allowed.to(device))
        return replace(self, bitmap=self.bitmap.to(device), under=under)

    def savable(self) -> Selection:
        """One that autograd may keep, whatever mode this one was made in."""
        bits = transforms.savable(self.bitmap)
        return self if bits is self.bitmap else replace(self, bitmap=bits)

    def recall(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Extent | Grid | Sequence | None = None,
        kv_grid: Extent | Grid | Sequence | None = None,
        scale: float | None = None,
        text_valid: Tensor | None = None,
        mask: Mask | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Share of the dense attention mass of the video queries that the selection keeps.

        Of a ``vsa.Sequence`` these are the queries that are sparse.

        Args:
            q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
            k: the same, with the keys' grid.
            grid: the queries' grid, unless the selection knows it.
            kv_grid: the keys' grid, unless the selection knows it.
            scale: factor of the scores, by default head_dim ** -0.5.
            text_valid: (B, prefix + suffix) bool, which text tokens are real.
            mask: what dense attention is under as well, and the selection is inside of; by default
                the mask that the selection was chosen under.
            backend: as in ``vsa.attention``.

        Returns:
            (B, heads) in [0, 1], fp32 (fp64 for fp64 inputs); every token counts the same.

        Raises:
            ValueError, TypeError: bad input, in one sentence that names the argument.
            RuntimeError: an explicit backend that cannot run here.
        """
        measure = _measures["recall"]
        return measure(
            self,
            q,
            k,
            grid=grid,
            kv_grid=kv_grid,
            scale=scale,
            text_valid=text_valid,
            mask=mask,
            backend=backend,
        )

    def __repr__(self) -> str:
        batch, heads, rows, columns = self.shape
        return f"Selection(batch={batch}, heads={heads}, query_tiles={rows}, key_tiles={columns})"


def measured_by(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let a function compute the method ``name`` of every selection."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _measures[name] = function
        return function

    return enter


def check_is_selection(value: object) -> None:
    """Something that has a selection's bitmap."""
    if not isinstance(getattr(value, "bitmap", None), Tensor):
        raise TypeError(
            f"selection must be a vsa.Selection, but it is of type {type(value).__name__}"
        )


def check_fits(
    value: Selection, q: Tensor, grid: Grid | Sequence, kv_grid: Grid | Sequence
) -> None:
    """A selection made for these batches, heads and tiles, whose bitmap is in order."""
    words = -(-value.num_key_tiles // 32)
    if value.bitmap.dtype != torch.int32 or value.bitmap.shape[3:] != (words,):
        raise ValueError(
            f"selection must have a bitmap (B, heads, n_q, {words}) int32 for its "
            f"{value.num_key_tiles} key tiles, but it is {tuple(value.bitmap.shape)} "
            f"{value.bitmap.dtype}: make one by vsa.select or vsa.Selection.from_mask"
        )
    wanted = (q.shape[0], q.shape[-2], grid.query_tiles, kv_grid.key_tiles)
    if value.shape != wanted:
        raise ValueError(
            "selection must be for (batch, heads, query tiles, key tiles) = "
            f"{wanted}, but it is for {value.shape}"
        )
    of_grids: tuple[object, object] = value.sequences or (value.grid, value.kv_grid)
    pairs = zip(("grid", "kv_grid"), of_grids, (grid, kv_grid), strict=True)
    for name, known, given in pairs:
        if known is not None and known != given:
            raise ValueError(
                f"selection was made for the {name} {known}, but it is used with {given}"
            )
    if value.bitmap.device != q.device:
        raise ValueError(
            "selection must share the device of q, but it is on "
            f"{value.bitmap.device} and q is on {q.device}"
        )
