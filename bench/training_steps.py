# SPDX-License-Identifier: Apache-2.0
"""Training steps of a small transformer, with sparse or with dense attention, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import vsa

MODELS = {
    "8 x 512, 16x32x32": ((16, 32, 32), 8, 512, 8),
    "8 x 512, 16x16x16": ((16, 16, 16), 8, 512, 8),
    "12 x 768, 16x32x32": ((16, 32, 32), 12, 768, 12),
    "12 x 768, 16x16x16": ((16, 16, 16), 12, 768, 12),
}
"""Grid, layers, channels and heads."""
TINY_MODELS = {"tiny": ((4, 8, 8), 2, 64, 1)}
TOPK = 32


class Dense(nn.Module):
    """The layer of the comparison: the same projections around dense attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim = x.shape[0], x.shape[-1]
        qkv = self.to_qkv(x).view(batch, -1, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A block of a transformer: attention and a perceptron, each with a norm before it."""

    def __init__(self, dim: int, heads: int, sparse: bool, backend: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = (
            vsa.nn.VideoSparseAttention(dim, heads, topk=TOPK, gates="both", backend=backend)
            if sparse
            else Dense(dim, heads)
        )
        self.perceptron = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.perceptron(self.norms[1](x))


class Kind(NamedTuple):
    """How a model computes its attention.

    Attributes:
        sparse: or dense.
        compiled: whether its blocks are.
        apart: whether the projections of a sparse layer are, where they could be one product.
    """

    sparse: bool
    compiled: bool = False
    apart: bool = False

    def __str__(self) -> str:
        attention = "sparse" if self.sparse else "dense"
        return attention + ", compiled blocks" * self.compiled + ", projections apart" * self.apart


class Training:
    """A model, its optimizer and a batch; bf16 autocast, AdamW, mean square error.

    Args:
        model: grid, layers, channels and heads.
        kind: of attention.
        device: "cuda" or "cpu".
        backend: of sparse attention.
    """

    def __init__(
        self,
        model: tuple[tuple[int, ...], int, int, int],
        kind: Kind,
        device: str,
        backend: str,
    ) -> None:
        grid, layers, dim, heads = model
        torch.manual_seed(0)
        blocks = [Block(dim, heads, kind.sparse, backend) for _ in range(layers)]
        if kind.compiled:
            torch.compiler.reset()
            for block in blocks:
                block.compile()
        self.device = device
        self.model = nn.Sequential(*blocks).to(device)
        self.x = torch.randn(1, *grid, dim, device=device)
        self.target = torch.randn_like(self.x)

    def step(self, capturable: bool = False) -> Callable[[], None]:
        """What takes a step, with an optimizer of its own, in a CUDA graph if capturable."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, capturable=capturable)

        def take() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss = functional.mse_loss(self.model(self.x), self.target)
            loss.backward()
            optimizer.step()

        return take


@contextmanager
def projections(apart: bool) -> Iterator[None]:
    """Sparse layers compute their projections one by one in here, if they are to be apart."""
    if not apart:
        yield
        return
    before, vsa.nn.MOST_FUSED_CHANNELS = vsa.nn.MOST_FUSED_CHANNELS, 0
    try:
        yield
    finally:
        vsa.nn.MOST_FUSED_CHANNELS = before
