# SPDX-License-Identifier: Apache-2.0
"""select: keep the best key tiles of every query tile (paper, section 2.2, TopK), as a bitmap.

No gradient flows through the choice. Scores that are equal go to the lowest key tile; NaN counts as
the lowest score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vsa import ops
from vsa.stages import inputs
from vsa.stages.coarse import tile_means
from vsa.stages.fine import fine
from vsa.values import bitmap, checks, transforms
from vsa.values.budget import Budget, TopK, resolve
from vsa.values.grid import Extent, Grid


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
    """

    bitmap: Tensor
    num_key_tiles: int
    grid: Grid | None = None
    kv_grid: Grid | None = None
    most: int | None = None

    @classmethod
    def from_mask(
        cls, mask: Tensor, grid: Grid | None = None, kv_grid: Grid | None = None
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
        for name, axis, given in (("grid", 2, grid), ("kv_grid", 3, kv_grid or grid)):
            if given is not None and given.num_tiles != mask.shape[axis]:
                raise ValueError(
                    f"mask has {mask.shape[axis]} tiles on axis {axis}, but {name} "
                    f"has {given.num_tiles}"
                )
        return cls(bitmap.pack(mask), mask.shape[-1], grid, kv_grid or grid)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, n_q, n_k)."""
        batch, heads, rows, _ = self.bitmap.shape
        return batch, heads, rows, self.num_key_tiles

    def mask(self) -> Tensor:
        """(B, heads, n_q, n_k) bool."""
        return bitmap.unpack(self.bitmap, self.num_key_tiles)

    @property
    def density(self) -> float:
        """Mean share of the key tiles that a query tile keeps. Reading it waits for the device."""
        rows = max(1, self.bitmap[..., 0].numel())
        return bitmap.count(self.bitmap).sum().item() / (rows * self.num_key_tiles)

    def transpose(self) -> Selection:
        """Which query tiles each key tile is attended by: the direction that the backward walks."""
        return Selection(bitmap.pack(self.mask().mT), self.shape[2], self.kv_grid, self.grid)

    def to(self, device: torch.device | str) -> Selection:
        """The same selection on another device."""
        return Selection(
            self.bitmap.to(device), self.num_key_tiles, self.grid, self.kv_grid, self.most
        )

    def savable(self) -> Selection:
        """One that autograd may keep, whatever mode this one was made in."""
        bits = inputs.savable(self.bitmap)
        return self if bits is self.bitmap else replace(self, bitmap=bits)

    def recall(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid: Extent | Grid | None = None,
        kv_grid: Extent | Grid | None = None,
        scale: float | None = None,
        text_valid: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Share of the dense attention mass of the video queries that the selection keeps.

        Args:
            q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
            k: likewise, with the keys' grid.
            grid: the queries' grid, unless the selection knows it.
            kv_grid: the keys' grid, unless the selection knows it.
            scale: factor of the scores, by default head_dim ** -0.5.
            text_valid: (B, prefix + suffix) bool, which text tokens are real.
            backend: as in ``vsa.attention``.

        Returns:
            (B, heads) in [0, 1], fp32 (fp64 for fp64 inputs); every token counts the same.
        """
        call = inputs.resolve(
            q,
            k,
            None,
            grid=grid,
            kv_grid=kv_grid,
            scale=scale,
            text_valid=text_valid,
            selection=self,
            backend=backend,
        )
        with torch.no_grad():
            return (video_lse(call, self) - video_lse(call, everything(call))).exp().mean(-1)

    def __repr__(self) -> str:
        batch, heads, rows, columns = self.shape
        return f"Selection(batch={batch}, heads={heads}, query_tiles={rows}, key_tiles={columns})"


def select(
    q: Tensor,
    k: Tensor,
    topk: TopK,
    *,
    grid: Extent | Grid | None = None,
    kv_grid: Extent | Grid | None = None,
    tile: inputs.Tile = inputs.DEFAULT_TILE,
    scale: float | None = None,
    must: Tensor | Literal["self"] | None = None,
) -> Selection:
    """Choose the key tiles with the largest scores of tile means for every query tile.

    Args:
        q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
        k: likewise with the keys' grid; its heads divide those of q, and each query head chooses
            for itself.
        topk: an int, key tiles per query tile; a float in (0, 1], their share: ceil(topk * n), at
            least 1; a tuple with one of these for each query head; or a ``vsa.TopP``, as many as
            hold a share of the softmax.
        grid: the queries' grid; None takes it from a video-shaped q, or cuts a flat one into runs
            of 64 tokens.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w), or "auto".
        scale: factor of the scores, by default head_dim ** -0.5; only its sign matters here, but
            for a ``vsa.TopP``.
        must: tiles that are always kept, (n_q, n_k) bool or "self" for each tile itself. They come
            first and count inside ``topk``; if more are forced than ``topk``, all of them stay.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
    """
    call = inputs.resolve(
        q, k, None, grid=grid, kv_grid=kv_grid, tile=tile, scale=scale, backend="torch"
    )
    budget = resolve(topk, call.kv_grid.num_tiles, call.q.shape[2])
    checks.must(must, call.q, call.grid, call.kv_grid)
    if call.transformed:
        return select_outside(budget, call, must)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q_means, k_means = tile_means((call.q, call.k), (call.grid, call.kv_grid))
        return select_tiles(q_means, k_means, budget, call, must)


def select_tiles(
    q_means: Tensor,
    k_means: Tensor,
    budget: Budget,
    call: inputs.Inputs,
    must: Tensor | Literal["self"] | None = None,
) -> Selection:
    """The stage on tile means (B, heads, n_q, head_dim) and (B, kv_heads, n_k, head_dim)."""
    most = budget.most if must is None or isinstance(must, str) else None
    if isinstance(must, str):
        must = torch.eye(call.grid.num_tiles, dtype=torch.bool, device=q_means.device)
    words = ops.select_tiles(
        q_means.detach(),
        k_means.detach(),
        must,
        budget.counts,
        call.scale,
        budget.mass,
        budget.numbers,
    )
    return Selection(words, call.kv_grid.num_tiles, call.grid, call.kv_grid, most)


def select_outside(
    budget: Budget, call: inputs.Inputs, must: Tensor | Literal["self"] | None = None
) -> Selection:
    """The choice for tensors inside of transforms, of their numbers: nothing flows through it."""
    q, k = transforms.primal(call.q), transforms.primal(call.k)
    with (
        transforms.outside(),
        torch.no_grad(),
        torch.autocast(q.device.type, enabled=False),
    ):
        q_means, k_means = tile_means((q, k), (call.grid, call.kv_grid))
        return select_tiles(q_means, k_means, budget, call, must)


def select_and_attend(
    means: Sequence[Tensor], budget: Budget, call: inputs.Inputs
) -> tuple[Selection, Tensor]:
    """``select_tiles``, and the coarse attention out of the same scores.

    Args:
        means: of q (B, heads, n_q, head_dim), of k and of v (B, kv_heads, n_k, head_dim).
        budget: tiles of a row.
        call: checked inputs.

    Returns:
        The selection, and the coarse output (B, heads, n_q, head_dim), without gradient.
    """
    q_means, k_means, v_means = means
    words, coarse = ops.select_and_attend(
        q_means,
        k_means,
        v_means,
        None,
        budget.counts,
        call.scale,
        budget.mass,
        budget.numbers,
    )
    selection = Selection(words, call.kv_grid.num_tiles, call.grid, call.kv_grid, budget.most)
    return selection, coarse


def everything(call: inputs.Inputs) -> Selection:
    """All key tiles for all query tiles: dense attention."""
    columns = call.kv_grid.num_tiles
    row = bitmap.full(columns, call.q.device)
    rows = row.expand(call.q.shape[0], call.q.shape[2], call.grid.num_tiles, -1).contiguous()
    return Selection(rows, columns, call.grid, call.kv_grid, columns)


def video_lse(call: inputs.Inputs, selection: Selection) -> Tensor:
    """Log-sum-exp of the video's queries over the selected tiles, (B, heads, tokens)."""
    _, lse = fine(call, selection)
    return lse[..., call.grid.prefix : call.grid.prefix + call.grid.tokens]
