# SPDX-License-Identifier: Apache-2.0
"""A diffusion transformer for video: patches of pixels in, their velocity out.

    h = h + gate_1 * attention(scale_1 * norm(h) + shift_1)
    h = h + gate_2 * mlp(scale_2 * norm(h) + shift_2)

Scales, shifts and gates come from the time, by one projection for all blocks and a table in each
(Chen et al., 2023, "adaLN-single"). q and k are normalised per head, then turned by the place of
their token along t, h and w. Plain modules: FSDP2 shards them block by block.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vsa.nn import VideoSparseAttention
from vsa.training import attention
from vsa.values.grid import Extent, Grid

HEAD_DIM = 64
PATCH = (1, 4, 4)
"""Frames, rows and columns of pixels in a token."""
COLOURS = 3
TOKEN_NUMBERS = PATCH[0] * PATCH[1] * PATCH[2] * COLOURS
TIME_WAVES = 256
LONGEST_WAVE = 10_000.0
"""Of the time's waves, and of the turns by place."""


@dataclass(frozen=True)
class Size:
    """How large a model is, and how it is trained unless asked otherwise.

    Attributes:
        dim: channels; a head has 64 of them.
        depth: blocks.
        grid: tokens along t, h, w.
        learning_rate: of AdamW.
        every: steps between two evaluations.
    """

    dim: int
    depth: int
    grid: Extent
    learning_rate: float
    every: int

    @property
    def heads(self) -> int:
        """Heads of 64 channels."""
        return self.dim // HEAD_DIM


SIZES = {
    "tiny": Size(64, 2, (8, 8, 8), 3e-3, 50),
    "10m": Size(320, 8, (16, 16, 16), 6e-4, 250),
    "25m": Size(512, 8, (16, 16, 16), 6e-4, 250),
    "60m": Size(640, 11, (16, 16, 16), 6e-4, 250),
}
"""By name; the names say how many weights there are without gates, but for ``tiny``."""


class VideoTransformer(nn.Module):
    """The model, with the weights that a seed draws.

    Two models of one size and seed start with the same numbers in all weights that both have.

    Args:
        size: a name of ``SIZES``.
        kind: of the attention, one of ``attention.KINDS``.
        grid: tokens of the video, in whole tiles.
        topk: key tiles per query tile where the kind is sparse.
        seed: of the weights, and of the tiles that ``random`` draws.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, size: str, kind: str, grid: Grid, topk: float, seed: int = 0) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, but it is {size!r}")
        found = SIZES[size]
        dim, heads = found.dim, found.heads
        self.grid, self.kind = grid, kind
        self.patch_in = nn.Linear(TOKEN_NUMBERS, dim)
        self.time_in = nn.Sequential(nn.Linear(TIME_WAVES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_out = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            Block(dim, attention.make(kind, dim, heads, grid, topk, seed, layer), grid)
            for layer in range(found.depth)
        )
        self.head_modulation = nn.Parameter(torch.zeros(2, dim))
        self.patch_out = nn.Linear(dim, TOKEN_NUMBERS)
        _initialise(self, seed)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, S, 48), patches of a mixture of video and noise in raster order.
            time: (B,) fp32, share of the noise.

        Returns:
            (B, S, 48) fp32.
        """
        code = self.time_in(_waves(time))
        modulation = self.time_out(functional.silu(code)).unflatten(-1, (6, -1)).float()
        h = self.patch_in(x).float()
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = (self.head_modulation + code.float()[:, None]).unsqueeze(2).unbind(1)
        return self.patch_out(_modulated(h, shift, scale)).float()

    def set_topk(self, topk: float) -> None:
        """Change the budget of all layers that choose tiles."""
        for block in self.layers:
            block.attention.topk = topk

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        return cast("list[Block]", list(self.blocks))


class Block(nn.Module):
    """Attention and MLP, each behind a norm whose scale, shift and gate the time sets."""

    def __init__(self, dim: int, layer: VideoSparseAttention, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.position = Position(grid)
        self.attention = layer
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        start = torch.zeros(6, dim)
        start[2::3] = 1.0  # gates: both branches are open from the first step on
        self.modulation = nn.Parameter(start)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """(B, S, dim) fp32, with (B, 6, dim) of the time, to (B, S, dim) fp32."""
        first, second = (self.modulation + modulation).unsqueeze(2).chunk(2, dim=1)
        shift, scale, gate = first.unbind(1)
        out = self.attention(_modulated(h, shift, scale), self.grid, rotary=self.position)
        h = torch.addcmul(h, gate, out.float())
        shift, scale, gate = second.unbind(1)
        return torch.addcmul(h, gate, self.mlp(_modulated(h, shift, scale)).float())


class Position(nn.Module):
    """Norm of q and k per head, then a turn of channel pairs by the token's place.

    Of the 32 pairs of a head, 12 turn by t, 10 by h and 10 by w.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.q_scale = nn.Parameter(torch.ones(HEAD_DIM))
        self.k_scale = nn.Parameter(torch.ones(HEAD_DIM))
        pairs = HEAD_DIM // 2
        side = pairs // 3
        axes = [torch.arange(extent, dtype=torch.float32) for extent in grid.shape]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        angles = []
        for axis, count in enumerate((pairs - 2 * side, side, side)):
            speed = LONGEST_WAVE ** (-torch.arange(count) / count)
            angles.append(place[:, axis, None] * speed)
        angle = torch.cat(angles, -1)[:, None]  # (S, 1, pairs)
        self.register_buffer("cosines", torch.cat((angle.cos(),) * 2, -1), persistent=False)
        self.register_buffer("sines", torch.cat((-angle.sin(), angle.sin()), -1), persistent=False)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, heads, 64) each, to the same shapes and types."""
        return self._turned(q, self.q_scale), self._turned(k, self.k_scale)

    def _turned(self, x: Tensor, scale: Tensor) -> Tensor:
        unit = functional.rms_norm(x.float(), (HEAD_DIM,), scale)
        other = unit.roll(HEAD_DIM // 2, -1)  # the second of each pair, and the first
        return torch.addcmul(unit * self.cosines, other, self.sines).to(x.dtype)


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:]), 1 + scale)


def _waves(time: Tensor) -> Tensor:
    """(B,) in [0, 1] to (B, 256)."""
    half = TIME_WAVES // 2
    places = torch.arange(half, device=time.device)
    angle = 1000 * time[:, None] * torch.exp(-math.log(LONGEST_WAVE) / half * places)
    return torch.cat((angle.cos(), angle.sin()), -1)


@torch.no_grad()
def _initialise(model: VideoTransformer, seed: int) -> None:
    """Draw every linear layer by the seed and its own name, whatever else the model has.

    Gates keep the numbers that they start with. What ends a residual branch is smaller with depth,
    and the last layer is zero, so that an untrained model predicts zero.
    """
    shrink = (2 * len(model.blocks)) ** -0.5
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or "to_gate" in name:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        deviation = layer.in_features**-0.5
        if name.endswith(("to_out", "mlp.2")):
            deviation *= shrink
        elif name in ("patch_out", "time_out"):
            deviation = 0.0
        layer.weight.normal_(0.0, deviation, generator=generator)
        nn.init.zeros_(layer.bias)
