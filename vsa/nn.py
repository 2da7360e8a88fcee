# SPDX-License-Identifier: Apache-2.0
"""A trainable attention layer around ``vsa.attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vsa.functional import attention
from vsa.stages.inputs import DEFAULT_TILE, Tile
from vsa.values import checks
from vsa.values.budget import TopK, resolve, varies
from vsa.values.grid import Extent, Grid
from vsa.values.selection import Selection


class VideoSparseAttention(nn.Module):
    """Self-attention over video tokens: projections around Video Sparse Attention.

    Gates are linear in the layer's input, element-wise and without activation (paper, section 2.2).
    The coarse gate starts at zero and the fine gate at one, so a fresh layer computes its fine
    stage alone, and with ``topk=1.0`` dense
    attention: fine-tuning starts from the dense model.

    Args:
        dim: channels of the input and output.
        heads: query heads; head_dim = dim / heads.
        topk: key tiles per query tile, as in ``vsa.attention``; an attribute that a schedule may
            change, compiled or not.
        kv_heads: key and value heads, a divisor of ``heads``; None for as many.
        gates: None for the fine stage alone, "coarse" for the paper's fine-tuning form, "both" for
            its training form.
        tile: tokens per tile along (t, h, w), or "auto".
        bias: whether the projections have biases.
        backend: as in ``vsa.attention``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        topk: TopK = 32,
        *,
        kv_heads: int | None = None,
        gates: Literal["coarse", "both"] | None = "coarse",
        tile: Tile = DEFAULT_TILE,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.integer("dim", dim, at_least=1)
        checks.integer("heads", heads, at_least=1)
        kv_heads = heads if kv_heads is None else checks.integer("kv_heads", kv_heads, at_least=1)
        if dim % heads:
            raise ValueError(
                f"dim must be a multiple of heads, but dim is {dim} and heads is {heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"kv_heads must divide heads, but kv_heads is {kv_heads} and heads is {heads}"
            )
        if gates not in (None, "coarse", "both"):
            raise ValueError(f'gates must be None, "coarse" or "both", but it is {gates!r}')
        resolve(topk, num_tiles=1, heads=heads)
        Grid((1, 1, 1), tile)  # for its checks
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.tile, self.backend = tile, backend
        self.topk = topk
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.to_gate_compress = _gate(dim, start=0.0) if gates else None
        self.to_gate_fine = _gate(dim, start=1.0) if gates == "both" else None
        self.to_out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        grid: Extent | Grid | None = None,
        *,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        selection: Selection | None = None,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, H, W, dim), or (B, S, dim) in raster order.
            grid: as in ``vsa.attention``.
            rotary: position embedding, maps (q, k) to (q, k), each (B, ..., heads, head_dim),
                before tiles are averaged.
            selection: a selection to reuse.
            text_valid: (B, prefix + suffix) bool.

        Returns:
            The shape of x.
        """
        checks.tokens("x", x, self.to_qkv.in_features)
        split = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = rearrange(self.to_qkv(x), "... (heads d) -> ... heads d", d=self.head_dim).split(
            split, dim=-2
        )
        if rotary is not None:
            q, k = rotary(q, k)
        out = attention(
            q,
            k,
            v,
            self._topk_for_call(),
            grid=grid,
            tile=self.tile,
            gate_coarse=self._gate_of(self.to_gate_compress, x),
            gate_fine=self._gate_of(self.to_gate_fine, x),
            selection=selection,
            text_valid=text_valid,
            backend=self.backend,
        )
        return self.to_out(rearrange(out, "... heads d -> ... (heads d)"))

    def _gate_of(self, projection: nn.Linear | None, x: Tensor) -> Tensor | None:
        return (
            None if projection is None else projection(x).unflatten(-1, (self.heads, self.head_dim))
        )

    @property
    def topk(self) -> TopK:
        """Key tiles per query tile; a change of the number does not compile the layer again."""
        if self._budget is not None:
            return self._budget
        return int(self._count) if self._counts else self._count

    @topk.setter
    def topk(self, value: TopK) -> None:
        # torch.compile takes a module's ints for constants, but not its floats.
        simple = isinstance(value, (int, float)) and not isinstance(value, bool)
        self._budget = None if simple else value
        self._counts = isinstance(value, int)
        self._count = float(value) if simple else 0.0  # type: ignore[arg-type]

    def _topk_for_call(self) -> TopK:
        if self._budget is None and self._counts and varies(self._count):
            return (torch.ones((), dtype=torch.float64) * self._count).long()
        return self.topk

    def extra_repr(self) -> str:
        """What ``print(layer)`` says of the layer itself."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, topk={self.topk}, tile={self.tile}"


def _gate(dim: int, start: float) -> nn.Linear:
    """A linear gate that is ``start`` everywhere until it has been trained."""
    gate = nn.Linear(dim, dim)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, start)
    return gate
