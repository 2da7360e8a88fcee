# SPDX-License-Identifier: Apache-2.0
"""Where a packed video's tokens are: its grid, out of the coordinates that LTX is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.values.grid import Extent
from vsa.values.masks import ChunkCausal

Call = Mapping[str, Any]
"""The arguments of the transformer's forward, by name."""


class Layout(NamedTuple):
    """The tokens of a video's own sequence: a grid, and other tokens before and after it.

    ``mask`` is the one that the model itself puts on them, if it does. ``segments`` are the tokens
    of each part before the video, where the coarse branch of the model's gates has tiles of them
    too; ``ungated`` says why gates cannot be honoured, if they cannot.
    """

    shape: Extent
    before: int = 0
    after: int = 0
    mask: ChunkCausal | None = None
    segments: tuple[int, ...] | None = None
    ungated: str | None = None


def layout_of(coordinates: Tensor, tokens: int) -> Layout:
    """The layout of frames that have one raster: the longest run of rising times is the video.

    Frames outside of it, as keyframes are, are tokens before and after the video. Reading the
    coordinates waits for the device.

    Args:
        coordinates: (B, 3, tokens) of any type, the time, y and x of every token.
        tokens: of the input.

    Raises:
        ValueError: coordinates of another form, or that are not those of such frames.
    """
    if coordinates.ndim != 3 or tuple(coordinates.shape[1:]) != (3, tokens):
        raise ValueError(
            f"video_coords must be (B, 3, {tokens}), as hidden_states has {tokens} tokens, but "
            f"its shape is {tuple(coordinates.shape)}"
        )
    layouts = {raster_of(each) for each in coordinates.detach().cpu().double()}
    layout = layouts.pop()
    if layouts or layout is None:
        raise ValueError(
            "video_coords must be those of whole frames in raster order, the same in all videos of "
            "a batch, but they are not, so that VSA cannot know the grid: pass num_frames, height "
            "and width as well"
        )
    return layout


def layout_with_appended(coordinates: Tensor, shape: Extent, tokens: int) -> Layout:
    """The layout of a video of known extents that other tokens follow, as LTX-2's pipelines do it.

    Args:
        coordinates: (B, 3, tokens, 2), where every token begins and ends in time, y and x; reading
            it waits for the device.
        shape: (T, H, W) of the video.
        tokens: of the input.

    Raises:
        ValueError: coordinates whose first tokens are not such a video.
    """
    count = math.prod(shape)
    if coordinates.ndim != 4 or tuple(coordinates.shape[1:]) != (3, tokens, 2):
        raise ValueError(
            f"video_coords must be (B, 3, {tokens}, 2), as hidden_states has {tokens} tokens, but "
            f"its shape is {tuple(coordinates.shape)}"
        )
    begins = coordinates[:, :, :count, 0].detach().cpu().double()
    if count > tokens or {raster_of(each) for each in begins} != {Layout(shape)}:
        raise ValueError(
            f"video_coords must begin with the {count} tokens of a video of {shape} in raster "
            f"order, which others may follow, but the first of its {tokens} tokens are not"
        )
    return Layout(shape, 0, tokens - count)


def raster_of(coordinates: Tensor) -> Layout | None:
    """Of one video, (3, tokens) on the CPU; None where there is no raster."""
    _, y, x = coordinates
    width = _rising(x)
    height = _rising(y[::width])
    size = height * width
    if x.numel() % size:
        return None
    time, y, x = coordinates.view(3, -1, height, width)
    raster = (
        (time == time[:, :1, :1]).all() and (y == y[:1, :, :1]).all() and (x == x[:1, :1, :]).all()
    )
    if not raster:
        return None
    times = time[:, 0, 0]
    falls = torch.nonzero(times.diff() <= 0).flatten() + 1
    runs = pairwise([0, *falls.tolist(), len(times)])
    # Of two as long the later one, as pipelines put keyframes first.
    start, end = max(runs, key=lambda run: (run[1] - run[0], run[0]))
    return Layout((end - start, height, width), start * size, (len(times) - end) * size)


def _rising(values: Tensor) -> int:
    """How many values rise from the first on."""
    falls = torch.nonzero(values.diff() <= 0)
    return int(falls[0]) + 1 if len(falls) else len(values)
