# SPDX-License-Identifier: Apache-2.0
"""Text tokens that every rank holds, around a video that is sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.distributed.shards import Ranks
from vsa.values.grid import Grid


def parted(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(B, prefix + video + suffix, ...) -> its three parts; the video may be a shard."""
    prefix, video, suffix = x.tensor_split((grid.prefix, x.shape[1] - grid.suffix), dim=1)
    return prefix, video, suffix


class Text:
    """The text of tensors that are exchanged: this rank's heads of it.

    Args:
        xs: (B, prefix + S_r + suffix, heads, channels) each.
        grids: of the whole sequence of each.
        ranks: that share out the heads.
    """

    def __init__(self, xs: Sequence[Tensor], grids: Sequence[Grid], ranks: Ranks) -> None:
        parts = [parted(x, grid) for x, grid in zip(xs, grids, strict=True)]
        self.videos = [video for _, video, _ in parts]
        self._texts = []
        for prefix, _, suffix in parts:
            heads = prefix.shape[2] // ranks.columns
            first = ranks.rank % ranks.columns * heads
            mine = slice(first, first + heads)
            self._texts.append((prefix[:, :, mine], suffix[:, :, mine]))

    def around(self, videos: Sequence[Tensor], heads: Sequence[slice]) -> list[Tensor]:
        """Put the text around whole videos.

        Args:
            videos: (B, T * H * W, heads, channels) each.
            heads: which of this rank's heads of each these are.
        """
        return [
            torch.cat([prefix[:, :, some], video, suffix[:, :, some]], dim=1)
            for video, (prefix, suffix), some in zip(videos, self._texts, heads, strict=True)
        ]


def for_every_rank(x: Tensor, grid: Grid, lengths: Sequence[int]) -> Tensor:
    """All text around every rank's part of the video, so that each gets the text of all heads.

    Args:
        x: (B, prefix + T * H * W + suffix, heads / P, channels).
        grid: of the whole sequence.
        lengths: the video tokens S_r of every rank.

    Returns:
        (B, sum of prefix + S_r + suffix, heads / P, channels).
    """
    prefix, video, suffix = parted(x, grid)
    pieces = [(prefix, part, suffix) for part in video.split(list(lengths), dim=1)]
    return torch.cat([piece for of_rank in pieces for piece in of_rank], dim=1)
