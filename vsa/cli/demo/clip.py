# SPDX-License-Identifier: Apache-2.0
"""A video file as the demo needs it: frames, a latent token grid, and q, k, v from its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional

from vsa.measure.video import decode
from vsa.values.grid import Extent

TOKEN_FRAMES, TOKEN_PIXELS = 4, 16
"""What one token covers along time and along each side, as in models for video."""
MOST_TOKENS = 15_500
"""Dense attention over them takes seconds on two cores."""
POOLED = 4
"""Pixels along each side of a token that v carries: 4 x 4 x 3 of its 64 channels."""

HEADS = ("colour", "texture", "motion", "place")
HEAD_DIM = 64
CONTENT_CHANNELS, POSITION_CHANNELS = 46, 18
POSITION_SHARE = {"colour": 0.1, "texture": 0.1, "motion": 0.3, "place": 0.5}
SHARPNESS = 18.0
"""Score of a token with itself: the perplexity of its attention is then some 5 to 300 tokens."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, resampled so that they are whole tokens.

    Attributes:
        name: the file's name.
        frames: (4 * T, 3, 16 * H, 16 * W) fp32 in [0, 1].
        numbers: (4 * T,), which frame of the file each one is.
        available: frames that could have been taken.
    """

    name: str
    frames: Tensor
    numbers: list[int]
    available: int

    @property
    def grid(self) -> Extent:
        """(T, H, W), tokens along each axis."""
        count, _, height, width = self.frames.shape
        return count // TOKEN_FRAMES, height // TOKEN_PIXELS, width // TOKEN_PIXELS


def read(path: Path, frames: int) -> Clip:
    """Take up to ``frames`` frames, evenly spread over the clip, in at most ``MOST_TOKENS`` tokens.

    Raises:
        ValueError: a file that is not a video, or one that has fewer than 8 frames.
    """
    images = decode(path)
    count = min(frames, len(images)) // TOKEN_FRAMES
    if count < 2:
        raise ValueError(
            f"the clip must have at least {2 * TOKEN_FRAMES} frames, "
            f"but {path.name} has {len(images)}"
        )
    numbers = torch.linspace(0, len(images) - 1, count * TOKEN_FRAMES).round().long().tolist()
    pixels = torch.stack([images[number] for number in numbers])
    height, width = _tokens_per_side(pixels.shape[1], pixels.shape[2], MOST_TOKENS // count)
    pixels = functional.interpolate(
        rearrange(pixels, "f h w c -> f c h w").float() / 255,
        (height * TOKEN_PIXELS, width * TOKEN_PIXELS),
        mode="bilinear",
        antialias=True,
    )
    return Clip(path.name, pixels.clamp(0, 1), numbers, len(images))


def queries_keys_values(clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """Attention between patches that look alike, as in non-local means, a head for each way of it.

    Scores are ``SHARPNESS`` times the cosine between whitened features, at the default scale.

    Returns:
        q, k, v: (1, T, H, W, heads, head_dim) fp32. v holds the token's pixels, see ``to_pixels``.
    """
    time, height, width = clip.grid
    patches = _patches(clip)
    position = _position(clip.grid)
    heads = [
        torch.cat((math.sqrt(1 - share) * _whiten(content), math.sqrt(share) * position), dim=-1)
        for share, content in zip(POSITION_SHARE.values(), _contents(patches), strict=True)
    ]
    scores = math.sqrt(SHARPNESS * math.sqrt(HEAD_DIM))
    q = rearrange(
        torch.stack(heads) * scores, "n (t h w) d -> 1 t h w n d", t=time, h=height, w=width
    )
    pixels = rearrange(patches.mean(3) - _mean_colour(clip), "t h w y x c -> 1 t h w 1 (y x c)")
    v = functional.pad(pixels, (0, HEAD_DIM - pixels.shape[-1])).expand_as(q)
    return q.contiguous(), q.clone(), v.contiguous()


def to_pixels(clip: Clip, out: Tensor, time: int) -> Tensor:
    """What attention made of the pixels in v at one latent frame, the mean over heads.

    Args:
        clip: the clip that v was made from.
        out: (1, T, H, W, heads, head_dim).
        time: the latent frame.

    Returns:
        (4 * H, 4 * W, 3) fp32 in [0, 1], on the CPU.
    """
    pixels = out[0, time, ..., : 3 * POOLED**2].float().mean(-2).cpu()
    image = rearrange(pixels, "h w (y x c) -> (h y) (w x) c", y=POOLED, x=POOLED)
    return (image + _mean_colour(clip)).clamp(0, 1)


def _tokens_per_side(height: int, width: int, most: int) -> tuple[int, int]:
    """Tokens down and across: as many as allowed at this aspect, none finer than 4 pixels."""
    down = math.sqrt(min(most, height * width / POOLED**2) * height / width)
    rows = max(1, min(most, int(down)))
    return rows, max(1, min(most // rows, round(rows * width / height)))


def _patches(clip: Clip) -> Tensor:
    """Pixels of every token, averaged to (T, H, W, 4 frames, 4 rows, 4 columns, 3 colours)."""
    pattern = "(t f) c (h y rows) (w x columns) -> t h w f y x c"
    side = TOKEN_PIXELS // POOLED
    return reduce(
        clip.frames, pattern, "mean", f=TOKEN_FRAMES, y=POOLED, x=POOLED, rows=side, columns=side
    )


def _mean_colour(clip: Clip) -> Tensor:
    return clip.frames.mean((0, 2, 3))


def _contents(patches: Tensor) -> tuple[Tensor, ...]:
    """What each head looks at, in the order of ``HEADS``: (T, H, W, channels) each."""
    still = patches.mean(3)
    pixels, surround = still.flatten(3), _surround(patches.mean((3, 4, 5)))
    detail = still - still.mean((3, 4), keepdim=True)
    contrast = detail.flatten(3).std(-1)[..., None, None, None]
    change = (patches - patches.mean(3, keepdim=True)).mean(-1).flatten(3)
    return (
        torch.cat((pixels, 2 * surround), dim=-1),
        (detail / (contrast + 0.03)).flatten(3),
        torch.cat((change, _surround(change.abs())), dim=-1),
        torch.cat((pixels, surround), dim=-1),
    )


def _surround(x: Tensor) -> Tensor:
    """Mean over the 3 x 3 x 3 neighbours of every token, (T, H, W, channels)."""
    padded = functional.pad(rearrange(x, "t h w c -> 1 c t h w"), (1,) * 6, mode="replicate")
    return rearrange(functional.avg_pool3d(padded, 3, stride=1), "1 c t h w -> t h w c")


def _whiten(x: Tensor) -> Tensor:
    """(T, H, W, channels) -> (S, 46): principal components on the unit sphere, weak ones damped."""
    x = x.flatten(0, 2)
    x = x - x.mean(0)
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    deviation = variance.clamp(min=0).sqrt()
    scaled = x @ directions / (deviation + 0.25 * deviation[-1]).clamp(min=1e-6)
    return functional.normalize(scaled[:, -CONTENT_CHANNELS:], dim=-1)


def _position(grid: Extent) -> Tensor:
    """Where each token is, (S, 18) on the unit sphere: three waves along each axis."""
    axes = [torch.linspace(-1, 1, extent) if extent > 1 else torch.zeros(1) for extent in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    waves = torch.arange(1, POSITION_CHANNELS // 6 + 1) * (math.pi / 2)
    angle = (place[..., None] * waves).flatten(1)
    return functional.normalize(torch.cat((angle.sin(), angle.cos()), dim=-1), dim=-1)
