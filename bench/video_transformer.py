# SPDX-License-Identifier: Apache-2.0
"""A small video diffusion transformer, trained for a while on clips, to capture attention from.

Built as current ones are: blocks of self-attention and an MLP, modulated by the noise level, with
rotary positions along t, h and w and normalised queries and keys; it learns the flow from noise to
latents (rectified flow). A token's latent is made of pixels by principal components, no VAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vsa.values.grid import Extent

LATENT_CHANNELS = 64
TOKEN_FRAMES, TOKEN_PIXELS = 4, 8
"""What one token covers along time and along each side."""
LAYERS, HEADS, HEAD_DIM = 4, 4, 64
WIDTH = HEADS * HEAD_DIM
AXES = (16, 24, 24)
"""Channels of a head that turn with the position along t, h and w."""


class Latents:
    """What turns frames into tokens: principal components of the first clip, whitened.

    Weak components are damped, as they would be noise.
    """

    def __init__(self, frames: Tensor, grid: Extent):
        patches = _patches(frames, grid).flatten(0, 2)
        self.mean = patches.mean(0)
        covariance = (patches - self.mean).T @ (patches - self.mean) / len(patches)
        variance, directions = torch.linalg.eigh(covariance)
        deviation = variance[-LATENT_CHANNELS:].clamp(min=0).sqrt()
        self.basis = directions[:, -LATENT_CHANNELS:] / (deviation + 0.05 * deviation[-1])

    def __call__(self, frames: Tensor, grid: Extent) -> Tensor:
        """Frames (n, height, width, 3) uint8 -> latents (T, H, W, 64) fp32."""
        return (_patches(frames, grid) - self.mean) @ self.basis


def _patches(frames: Tensor, grid: Extent) -> Tensor:
    """The first frames, resized so that they are whole tokens, (T, H, W, 768) in [0, 1]."""
    count, height, width = grid[0] * TOKEN_FRAMES, grid[1] * TOKEN_PIXELS, grid[2] * TOKEN_PIXELS
    images = [
        functional.interpolate(part.movedim(-1, 1) / 255, (height, width), mode="area")
        for part in frames[:count].float().split(16)
    ]
    pattern = "(t f) c (h y) (w x) -> t h w (f y x c)"
    return rearrange(torch.cat(images), pattern, f=TOKEN_FRAMES, y=TOKEN_PIXELS, x=TOKEN_PIXELS)


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.normalise_q, self.normalise_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def queries_keys_values(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X (B, S, width), turns (S, 32) complex -> q, k, v (B, heads, S, head_dim)."""
        q, k, v = rearrange(self.project(x), "b s (x n d) -> x b n s d", x=3, n=HEADS)
        return rotate(self.normalise_q(q), turns), rotate(self.normalise_k(k), turns), v

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x, turns)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(out, "b n s d -> b s (n d)"))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of channels of (..., S, head_dim) by (S, head_dim / 2) complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def turns_of(place: Tensor) -> Tensor:
    """What positions (S, 3) along t, h and w turn pairs of channels by, (S, 32) complex."""
    angles = []
    for axis, channels in enumerate(AXES):
        speed = 1000.0 ** -(torch.arange(0, channels, 2, device=place.device) / channels)
        angles.append(place[:, axis, None] * speed)
    angle = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(angle), angle)


class Block(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.modulate = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, level: Tensor, turns: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(level).chunk(6, -1)
        x = x + gate * self.attention(self.normalise(x) * (1 + scale) + shift, turns)
        return x + mlp_gate * self.mlp(self.normalise(x) * (1 + mlp_scale) + mlp_shift)


class VideoTransformer(nn.Module):
    """Predicts the flow, noise minus latent, of noisy latents."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(LATENT_CHANNELS, WIDTH)
        self.level = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.write = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LATENT_CHANNELS))

    def forward(self, x: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        """Noisy latents (B, S, 64), share of noise (B,), positions (S, 3) -> flow (B, S, 64)."""
        speed = torch.logspace(0, 3, WIDTH // 2, device=x.device)
        angle = noise[:, None, None] * speed
        level = self.level(torch.cat((angle.sin(), angle.cos()), -1))
        turns, x = turns_of(place), self.read(x)
        for block in self.blocks:
            x = block(x, level, turns)
        return self.write(x)


def places(grid: Extent, device: torch.device) -> Tensor:
    """Positions of all tokens of a grid in raster order, (S, 3) fp32."""
    axes = [torch.arange(extent, device=device).float() for extent in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def noisy(latent: Tensor, share: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents (B, S, 64) mixed with a share (B,) of noise, and the flow from latent to noise."""
    noise = torch.randn(latent.shape, generator=generator, device=latent.device)
    return torch.lerp(latent, noise, share[:, None, None]), noise - latent


def subgrids(
    latents: Sequence[Tensor], size: Extent, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training examples without end: latents (1, S, 64) and positions (S, 3).

    Each is a box of ``size`` tokens whose steps along the axes are drawn between one and what the
    clip has room for, so that near and far positions are learnt.
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    while True:
        latent = latents[below(len(latents))]
        index = []
        for extent, count in zip(latent.shape[:3], size, strict=True):
            count = min(count, extent)
            most = max(1, (extent - 1) // max(1, count - 1))
            step = round(math.exp(math.log(most) * below(1000) / 999))
            start = below(extent - step * (count - 1))
            index.append(torch.arange(count) * step + start)
        chosen = latent[index[0]][:, index[1]][:, :, index[2]]
        place = torch.stack(torch.meshgrid(*index, indexing="ij"), -1).flatten(0, 2).float()
        yield chosen.flatten(0, 2)[None], place


def train(
    latents: Sequence[Tensor],
    steps: int,
    size: Extent,
    seed: int,
    device: torch.device,
    heard: Callable[[float], None],
) -> VideoTransformer:
    """Train a new model.

    Args:
        latents: clips, (T, H, W, 64) each.
        steps: of AdamW.
        size: tokens of an example along t, h and w.
        seed: of the weights, the examples and the noise.
        device: where it is trained, in fp32.
        heard: is told the loss of every step.
    """
    torch.manual_seed(seed)
    model = VideoTransformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    warm = max(1, min(50, steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.05, 1 - n / steps))
    )
    examples = subgrids(latents, size, torch.Generator().manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(steps):
        latent, place = (x.to(device) for x in next(examples))
        share = torch.rand(1, generator=generator, device=device)
        mixed, flow = noisy(latent, share, generator)
        loss = functional.mse_loss(model(mixed, share, place), flow)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        heard(loss.item())
    return model.eval()
