# SPDX-License-Identifier: Apache-2.0
"""Means of the tiles of a sequence, segment by segment, straight from the raster layout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends import torch_coarse
from vsa.backends.tiles import accumulation_dtype
from vsa.stages import coarse
from vsa.stages.sequences.layout import tokens_in_tiles
from vsa.values.grid import Grid
from vsa.values.sequence import Segment, Sequence

NO_SCORE = -1e30
"""Stands for -inf, whose products would be NaN: of a tile without a token."""


class TileMeans:
    """Means of tensors that lie in one sequence, by segment.

    Attributes:
        of: for each segment that is wanted, by its place, the means of each tensor, (B, heads,
            tiles, head_dim) fp32 (fp64 for fp64 inputs); zero for a tile without a real token.
        counts: likewise, the real tokens of its tiles, (B, tiles), where ``text_valid`` says that
            there may be none; None elsewhere.
    """

    def __init__(
        self,
        xs: list[Tensor],
        sequence: Sequence,
        wanted: list[bool],
        text_valid: Tensor | None,
        backend: str,
    ) -> None:
        """Of ``xs``, (B, S, heads, head_dim) each."""
        self.of: dict[int, list[Tensor]] = {}
        self.counts: dict[int, Tensor | None] = {}
        first = text = 0
        for place, segment in enumerate(sequence.segments):
            after = first + segment.tokens
            valid = None
            if text_valid is not None and not segment.is_video:
                valid = text_valid[:, text : text + segment.tokens]
                text += segment.tokens
            if wanted[place]:
                parts = [x[:, first:after] for x in xs]
                self.of[place] = _means(parts, segment, valid, backend)
                self.counts[place] = None if valid is None else tokens_in_tiles(segment, valid)
            first = after

    def joined(self, which: int, places: list[int]) -> Tensor:
        """Means of one of the tensors over several segments, (B, heads, tiles, head_dim)."""
        return _cat([self.of[place][which] for place in places], dim=2)

    def empty(self, places: list[int]) -> Tensor | None:
        """Which tiles of these segments have no real token, (B, tiles) bool; None if all have."""
        if all(self.counts[place] is None for place in places):
            return None
        found = []
        for place in places:
            counts, means = self.counts[place], self.of[place][0]
            none = torch.zeros(
                means.shape[0], means.shape[2], dtype=torch.bool, device=means.device
            )
            found.append(none if counts is None else counts == 0)
        return torch.cat(found, dim=1)


def without_empty(
    q_means: Tensor, k_means: Tensor, empty: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Means whose products, times 1, are scores: those of empty key tiles below any other.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        empty: (B, n_k) bool.
        scale: factor of the scores.

    Returns:
        Both with two channels more.
    """
    bias = torch.zeros_like(empty, dtype=k_means.dtype).masked_fill(empty, NO_SCORE)
    of_keys = torch.stack((bias, torch.zeros_like(bias)), dim=-1)
    of_queries = q_means.new_zeros(2)
    of_queries[:1].fill_(1)
    return (
        torch.cat((q_means * scale, of_queries.expand(*q_means.shape[:3], 2)), dim=-1),
        torch.cat((k_means, of_keys[:, None].expand(*k_means.shape[:3], 2)), dim=-1),
    )


def _means(xs: list[Tensor], segment: Segment, valid: Tensor | None, backend: str) -> list[Tensor]:
    if valid is not None:
        return [_of_valid(x, segment, valid) for x in xs]
    if type(segment.boxes) is not Grid:  # larger tiles than the kernels know
        return [torch_coarse.tile_means(x, segment.boxes) for x in xs]
    return coarse.tile_means(xs, [segment.boxes] * len(xs), backend)


def _of_valid(x: Tensor, segment: Segment, valid: Tensor) -> Tensor:
    """Means over the real tokens of a flat segment (B, tokens, heads, head_dim)."""
    tile = segment.boxes.box[2]
    # By where, so that neither an invalid number nor its gradient is multiplied by anything.
    real = torch.where(valid[:, :, None, None], x.to(accumulation_dtype(x)), 0)
    padding = segment.num_tiles * tile - segment.tokens
    sums = functional.pad(real, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, tile)).sum(2)
    counts = tokens_in_tiles(segment, valid).clamp(min=1)
    return (sums / counts[:, :, None, None]).transpose(1, 2).contiguous()


def _cat(xs: list[Tensor], dim: int) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(xs, dim)
