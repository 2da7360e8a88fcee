# SPDX-License-Identifier: Apache-2.0
"""A tiny diffusion transformer that is causal over chunks of frames: the model of streaming.py.

Each frame has a noise level of its own, so that a chunk may be noisy where its past is clean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

import vsa

PATCH = 4  # pixels along h and w in a token
COLOURS = 3
WAVES = 32  # of a time


class CausalTransformer(nn.Module):
    """Predicts the video from noisy patches (B, T, H, W, 48) at noise levels (B, T).

    Args:
        dim: channels.
        heads: of the attention.
        depth: blocks.
        topk: share of the key tiles that a query tile keeps.
        tile: tokens per tile; its extent along t divides a chunk.
    """

    def __init__(
        self, dim: int, heads: int, depth: int, topk: float, tile: tuple[int, int, int]
    ) -> None:
        super().__init__()
        numbers = PATCH * PATCH * COLOURS
        self.patch_in, self.patch_out = nn.Linear(numbers, dim), nn.Linear(dim, numbers)
        self.time_in = nn.Sequential(nn.Linear(2 * WAVES, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads, topk, tile) for _ in range(depth))
        nn.init.zeros_(self.patch_out.weight)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        frames: Tensor,
        mask: vsa.masks.Mask | None = None,
        caches: Sequence[vsa.KVCache] | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, T, H, W, 48), a whole video, or the current chunk where there are caches.
            time: (B, T), share of the noise in each frame.
            frames: (T,), the place of each frame in the video.
            mask: of training.
            caches: one for each block, for generation.
        """
        angle = time[..., None] * math.pi * 2.0 ** torch.linspace(-1, 6, WAVES)
        code = self.time_in(torch.cat((angle.cos(), angle.sin()), -1))[:, :, None, None]
        h = self.patch_in(x)
        turn = turns(frames, *x.shape[2:4], self.blocks[0].attention.head_dim)
        for number, block in enumerate(self.blocks):
            h = block(h, code, turn, mask, None if caches is None else caches[number])
        share = time[..., None, None, None]
        return (1 - share) * x + self.patch_out(functional.layer_norm(h, h.shape[-1:]))


class Block(nn.Module):
    """Attention and MLP, behind norms that the noise level scales and shifts."""

    def __init__(self, dim: int, heads: int, topk: float, tile: tuple[int, int, int]) -> None:
        super().__init__()
        self.attention = vsa.nn.VideoSparseAttention(dim, heads, topk, gates="coarse", tile=tile)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(
        self,
        h: Tensor,
        code: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: vsa.masks.Mask | None,
        cache: vsa.KVCache | None,
    ) -> Tensor:
        """(B, T, H, W, dim) to the same, with a code (B, T, 1, 1, dim) of the noise levels."""
        shift, scale, shift_mlp, scale_mlp = self.modulation(code).chunk(4, -1)
        self.attention.mask = mask
        x = functional.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift

        def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return turned(q, turn), turned(k, turn)

        h = h + self.attention(x, rotary=rotary, cache=cache)
        return h + self.mlp(functional.layer_norm(h, h.shape[-1:]) * (1 + scale_mlp) + shift_mlp)


def turns(frames: Tensor, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, H, W, 1, head_dim / 2) of each token's place."""
    side = head_dim // 2 // 3
    places = (
        (frames, head_dim // 2 - 2 * side),
        (torch.arange(height), side),
        (torch.arange(width), side),
    )
    angles = [place[:, None] * 100.0 ** (-torch.arange(n) / n) for place, n in places]
    t, h, w = angles
    size = len(frames), height, width, -1
    angle = torch.cat(
        (
            t[:, None, None].expand(size),
            h[None, :, None].expand(size),
            w[None, None].expand(size),
        ),
        dim=-1,
    )[:, :, :, None]
    return angle.cos(), angle.sin()


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of the normalised channels of x (B, T, H, W, heads, head_dim), turned."""
    cosine, sine = turn
    a, b = functional.rms_norm(x, x.shape[-1:]).chunk(2, -1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), -1)


def patches(pixels: Tensor) -> Tensor:
    """(B, T, 3, H, W) uint8 to (B, T, H / 4, W / 4, 48), about of unit variance."""
    pattern = "b t c (h y) (w x) -> b t h w (y x c)"
    return rearrange((pixels.float() - 127.5) / 64, pattern, y=PATCH, x=PATCH)


def pixels(x: Tensor) -> Tensor:
    """The inverse, (T, H, W, 3) uint8 of the first video of a batch."""
    pattern = "t h w (y x c) -> t (h y) (w x) c"
    image = rearrange(x[0], pattern, y=PATCH, x=PATCH) * 64 + 127.5
    return image.round().clamp(0, 255).byte()
