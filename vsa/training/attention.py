# SPDX-License-Identifier: Apache-2.0
"""The kinds of attention that runs compare, all behind the same projections.

full    out = softmax(q k^T) v over all tokens
fine    the same over the chosen tiles alone
vsa     gate_fine * fine + gate_coarse * coarse, as the paper trains it
coarse  gate_coarse * coarse alone: attention between the means of tiles
window, random   fine over given tiles, as many for each query tile as the others choose
ramp, abrupt     fine + gate_coarse * coarse, dense at first
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional

from vsa.nn import VideoSparseAttention
from vsa.stages.inputs import Layout
from vsa.values import checks
from vsa.values.bitmap import pack
from vsa.values.grid import Grid
from vsa.values.kv_cache import KVCache
from vsa.values.selection import Selection

KINDS = {
    "full": "dense attention by PyTorch",
    "vsa": "Video Sparse Attention with both gates, as in the paper",
    "fine": "the chosen tiles alone, without the coarse branch",
    "coarse": "the coarse branch alone, behind its gate",
    "window": "the nearest tiles, as many as vsa keeps",
    "random": "tiles drawn once for each layer and head, as many as vsa keeps",
    "ramp": "dense at first, then fewer tiles step by step, with a coarse gate",
    "abrupt": "dense at first, then sparse at once, with a coarse gate",
}
"""What ``--kinds`` may name, and what each is."""
ADAPTED = ("ramp", "abrupt")
"""Begin dense and become sparse."""
FIXED = ("window", "random")
"""Attend tiles that no score has chosen."""

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DenseAttention(VideoSparseAttention):
    """Dense attention by PyTorch behind the projections of ``VideoSparseAttention``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, topk=1.0, gates=None)

    def forward(
        self,
        x: Tensor,
        grid: Layout | None = None,
        *,
        rotary: Rotary | None = None,
        selection: Selection | None = None,
        text_valid: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend all tokens; (B, S, dim) to the same shape."""
        _refuse(cache)
        q, k, v = _projected(self, x, rotary)
        return self.to_out(_dense(q, k, v).flatten(-2))


class CoarseAttention(VideoSparseAttention):
    """The coarse branch alone: tile means attend tile means, every token adds its gate.

    The gate starts at one: at zero the layer would start as nothing.
    """

    def __init__(self, dim: int, heads: int, grid: Grid) -> None:
        super().__init__(dim, heads, topk=1.0, gates="coarse")
        assert self.to_gate_compress is not None
        nn.init.ones_(self.to_gate_compress.bias)
        self.video = grid

    def forward(
        self,
        x: Tensor,
        grid: Layout | None = None,
        *,
        rotary: Rotary | None = None,
        selection: Selection | None = None,
        text_valid: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend tile means; (B, S, dim) to the same shape."""
        _refuse(cache)
        (nt, nh, nw), (t, h, w) = self.video.tiles, self.video.box
        tiles = {"nt": nt, "nh": nh, "nw": nw, "t": t, "h": h, "w": w}
        pattern = "b (nt t nh h nw w) n d -> b (nt nh nw) n d"
        means = [reduce(each, pattern, "mean", **tiles) for each in _projected(self, x, rotary)]
        pattern = "b (nt nh nw) n d -> b (nt t nh h nw w) n d"
        out = repeat(_dense(*means), pattern, **tiles)
        assert self.to_gate_compress is not None
        gate = self._of_heads(self.to_gate_compress(x))
        return self.to_out((out * gate).flatten(-2))


class FixedAttention(VideoSparseAttention):
    """The fine stage over given tiles.

    Args:
        dim: channels.
        heads: query heads.
        grid: the video.
        mask: (heads, n, n) bool, the key tiles of every query tile, equally many in each row.
    """

    bitmap: Tensor

    def __init__(self, dim: int, heads: int, grid: Grid, mask: Tensor) -> None:
        super().__init__(dim, heads, topk=1.0, gates=None)
        self.video, self.count = grid, int(mask[0, 0].sum())
        self.register_buffer("bitmap", pack(mask[None]), persistent=False)

    def forward(
        self,
        x: Tensor,
        grid: Layout | None = None,
        *,
        rotary: Rotary | None = None,
        selection: Selection | None = None,
        text_valid: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend the given tiles; (B, S, dim) to the same shape."""
        _refuse(cache)
        return super().forward(x, self.video, rotary=rotary, selection=self.selection(len(x)))

    def selection(self, batch: int) -> Selection:
        """The given tiles, for a batch."""
        bitmap = self.bitmap.expand(batch, -1, -1, -1).contiguous()
        return Selection(bitmap, self.video.num_tiles, self.video, self.video, self.count)


def _refuse(cache: KVCache | None) -> None:
    """Kinds that are compared see whole videos."""
    if cache is not None:
        raise ValueError(
            "cache must be None in a kind of attention that sees whole videos, but it is "
            f"{cache}: use vsa.nn.VideoSparseAttention"
        )


def make(
    kind: str, dim: int, heads: int, grid: Grid, topk: float, seed: int, layer: int
) -> VideoSparseAttention:
    """The attention of one layer.

    Args:
        kind: one of ``KINDS``.
        dim: channels.
        heads: query heads.
        grid: the video, in whole tiles.
        topk: key tiles per query tile where the kind is sparse, a number or a share.
        seed: of the tiles that ``random`` draws.
        layer: number of the layer, which draws tiles of its own.

    Raises:
        ValueError: another kind, or tiles that are clipped at an edge.
    """
    if kind not in KINDS:
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, but one is {kind!r}")
    if grid.is_ragged:
        raise ValueError(
            f"grid must consist of whole tiles of {grid.tile}, but it is {grid.shape}: "
            "take multiples of them"
        )
    if kind == "full":
        return DenseAttention(dim, heads)
    if kind == "coarse":
        return CoarseAttention(dim, heads, grid)
    if kind in FIXED:
        count = checks.top_k(topk, grid.num_tiles)
        mask = (
            nearest_tiles(grid, count).expand(heads, -1, -1)
            if kind == "window"
            else random_tiles(grid, heads, count, seed=seed * 1_000 + layer)
        )
        return FixedAttention(dim, heads, grid, mask)
    if kind in ADAPTED:
        return VideoSparseAttention(dim, heads, topk=1.0, gates="coarse")
    return VideoSparseAttention(dim, heads, topk, gates="both" if kind == "vsa" else None)


def nearest_tiles(grid: Grid, count: int) -> Tensor:
    """The ``count`` key tiles nearest to each query tile, itself first; (n, n) bool.

    Distances are between the centres of tiles, in tokens; of equal ones the first tile counts.
    """
    axes = torch.unravel_index(torch.arange(grid.num_tiles), grid.tiles)
    place = torch.stack(axes, 1) * torch.tensor(grid.box)
    squares = (place[:, None] - place).square().sum(-1)
    chosen = squares.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros(grid.num_tiles, grid.num_tiles, dtype=torch.bool).scatter_(1, chosen, True)


def random_tiles(grid: Grid, heads: int, count: int, seed: int) -> Tensor:
    """Each query tile itself and ``count - 1`` others, drawn by a seed; (heads, n, n) bool."""
    n = grid.num_tiles
    drawn = torch.rand(heads, n, n, generator=torch.Generator().manual_seed(seed))
    drawn.diagonal(dim1=1, dim2=2).fill_(2.0)
    return torch.zeros(heads, n, n, dtype=torch.bool).scatter_(2, drawn.topk(count).indices, True)


def _projected(
    layer: VideoSparseAttention, x: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as ``VideoSparseAttention`` makes them, (B, S, heads, head_dim) each."""
    pattern = "b s (three heads d) -> three b s heads d"
    q, k, v = rearrange(layer.to_qkv(x), pattern, three=3, heads=layer.heads).unbind()
    return (q, k, v) if rotary is None else (*rotary(q, k), v)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention on (B, S, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)
