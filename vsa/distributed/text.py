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


def around(video: Tensor, held: Tensor, grid: Grid, ranks: Ranks) -> Tensor:
    """Put this rank's heads of the text that it holds around the whole video.

    Args:
        video: (B, T * H * W, heads / P, channels).
        held: (B, prefix + S_r + suffix, heads, channels), of which the text is taken.
        grid: of the whole sequence.
        ranks: that share out the heads.
    """
    heads = video.shape[2]
    first = ranks.rank % ranks.columns * heads
    prefix, _, suffix = parted(held[:, :, first : first + heads], grid)
    return torch.cat([prefix, video, suffix], dim=1)


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
