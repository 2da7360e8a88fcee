# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of tiles stand in the sequence, which are real, and in which type to sum."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.values import padded
from vsa.values.grid import Grid
from vsa.values.problem import FineProblem


def slot_tokens(grid: Grid, slots: int, device: torch.device) -> Tensor:
    """Sequence position in every slot of every tile.

    The video's tiles come first, then the text cut into runs of ``slots``.

    Returns:
        (num_tiles + ceil(text / slots), slots) int64, -1 in slots without a token.
    """
    video = grid.tokens_of_tiles(device)
    video = torch.where(video < 0, video, video + grid.prefix)
    video = torch.nn.functional.pad(video, (0, slots - video.shape[1]), value=-1)
    text = text_positions(grid, device)
    text = torch.nn.functional.pad(text, (0, -grid.text % slots), value=-1)
    return torch.cat((video, text.view(-1, slots)))


def text_positions(grid: Grid, device: torch.device) -> Tensor:
    """Sequence positions of the text tokens, prefix first, (text,) int64."""
    position = torch.arange(grid.text, device=device)
    return torch.where(position < grid.prefix, position, position + grid.tokens)


def token_valid(text_valid: Tensor | None, grid: Grid, device: torch.device) -> Tensor:
    """Which tokens of the sequence are real, (B or 1, length) bool."""
    batch = 1 if text_valid is None else text_valid.shape[0]
    valid = torch.ones(batch, grid.length, dtype=torch.bool, device=device)
    if text_valid is not None:
        valid[:, : grid.prefix] = text_valid[:, : grid.prefix]
        valid[:, grid.length - grid.suffix :] = text_valid[:, grid.prefix :]
    return valid


def real_tokens(problem: FineProblem) -> tuple[Tensor, Tensor]:
    """Which tokens of the queries and of the keys are real, (B or 1, length) bool each."""
    sides = zip(problem.grids, problem.tile_sizes, strict=True)
    queries, keys = (
        token_valid(problem.text_valid, grid, problem.q.device)
        if sizes is None
        else padded.real_slots(sizes).view(1, -1)
        for grid, sizes in sides
    )
    return queries, keys


def smallest_tile(grid: Grid) -> int:
    """Tokens of the tile that is clipped most."""
    t, h, w = (extent % size or size for extent, size in zip(grid.shape, grid.box, strict=True))
    return t * h * w


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type that means, scores and softmax are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)
