# SPDX-License-Identifier: Apache-2.0
"""A trainable attention layer around ``vsa.attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from vsa.functional import attention
from vsa.stages.inputs import DEFAULT_TILE, Layout, Tile
from vsa.values import checks
from vsa.values.budget import TopK, check, varies
from vsa.values.grid import Grid
from vsa.values.kv_cache import KVCache
from vsa.values.masks import RULES, Mask
from vsa.values.masks import check as check_mask
from vsa.values.precision import Precision, check_tail, named
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection

MOST_FUSED_CHANNELS = 1024
"""Of a layer whose projections are computed as one."""
FEWEST_FUSED_TOKENS = 16_384
"""Of a batch whose projections are: with fewer the host takes longer to put weights together than
the GPU gains."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module keeps what is called along with it."""


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
        score: what tiles are chosen by, as in ``vsa.attention``.
        tail: as in ``vsa.attention``; an attribute, too.
        mask: as in ``vsa.attention``; an attribute, too.
        precision: as in ``vsa.attention``, for inference; an attribute, too.
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
        score: Score = "mean",
        tail: bool = False,
        mask: Mask | None = None,
        precision: Precision = "native",
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
        check(topk, heads)
        Grid((1, 1, 1), tile)  # for its checks
        runs_of(score)  # likewise
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.tile, self.score, self.backend = tile, score, backend
        self.tail, self.precision = checks.flag("tail", tail), named(precision)
        check_tail(precision, tail)
        check_mask(mask)
        self.mask = mask
        self.topk = topk
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.to_gate_compress = _gate(dim, start=0.0) if gates else None
        self.to_gate_fine = _gate(dim, start=1.0) if gates == "both" else None
        self.to_out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        grid: Layout | None = None,
        *,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        selection: Selection | None = None,
        text_valid: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, H, W, dim), or (B, S, dim) in raster order.
            grid: as in ``vsa.attention``.
            rotary: position embedding, maps (q, k) to (q, k), each (B, ..., heads, head_dim),
                before tiles are averaged.
            selection: a selection to reuse.
            text_valid: (B, prefix + suffix) bool, or as in ``vsa.attention``.
            cache: as in ``vsa.attention``, where x is the current chunk of a video; it takes the
                place of ``mask``.

        Returns:
            The shape of x.
        """
        checks.tokens("x", x, self.to_qkv.in_features)
        if cache is not None and self.tile not in ("auto", cache.tile):
            raise ValueError(
                f"tile of the cache must be that of the layer, {self.tile}, but it is {cache.tile}"
            )
        q, k, v, gate_coarse, gate_fine = self.projections(x)
        if rotary is not None:
            q, k = rotary(q, k)
        out = self.attend(
            q,
            k,
            v,
            self._topk_for_call(),
            grid=grid,
            tile=self.tile,
            gate_coarse=gate_coarse,
            gate_fine=gate_fine,
            selection=selection,
            score=self.score,
            text_valid=text_valid,
            tail=self.tail,
            mask=self.mask if selection is cache is None else None,
            precision=self.precision,
            backend=self.backend,
            **({} if cache is None else {"cache": cache}),
        )
        return self.to_out(out.flatten(-2))

    attend: Callable[..., Tensor] = staticmethod(attention)
    """What computes attention; ``vsa.distributed.shard_sequence`` puts another in its place."""

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v and both gates, None for those that are not there."""
        gates = [x for x in (self.to_gate_compress, self.to_gate_fine) if x is not None]
        heads = [self.heads, self.kv_heads, self.kv_heads]
        layers = self.to_qkv, *gates
        # What is in a gate's place may be narrower: it is broadcast.
        widths = [sum(heads) * self.head_dim, *[self.heads * self.head_dim] * len(gates)]
        if _are_one_product(layers, widths, math.prod(x.shape[:-1])):
            weight = torch.cat([layer.weight for layer in layers])
            bias = torch.cat([layer.bias for layer in layers])
            heads += [self.heads] * len(gates)
            q, k, v, *found = self._of_heads(functional.linear(x, weight, bias)).split(heads, -2)
        else:
            q, k, v = self._of_heads(self.to_qkv(x)).split(heads, -2)
            found = [self._of_heads(gate(x)) for gate in gates]
        return q, k, v, *(*found, None, None)[:2]  # there is no fine gate without a coarse one

    def _of_heads(self, x: Tensor) -> Tensor:
        # Not by einops, whose parser is traced along, at five times the steps of attention itself.
        return x.unflatten(-1, (-1, self.head_dim))

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
        score = "" if self.score == "mean" else f", score={self.score}"
        known = f"heads={self.heads}, kv_heads={self.kv_heads}, topk={self.topk}"
        more = ", tail=True" if self.tail else ""
        more += f", mask={self.mask}" if isinstance(self.mask, RULES) else ""
        more += "" if self.precision == "native" else f", precision={self.precision}"
        return f"{known}, tile={self.tile}{score}{more}"


def _gate(dim: int, start: float) -> nn.Linear:
    """A linear gate that is ``start`` everywhere until it has been trained."""
    gate = nn.Linear(dim, dim)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, start)
    return gate


def _are_one_product(layers: Sequence[nn.Linear], widths: Sequence[int], tokens: int) -> bool:
    """Whether all projections of so many tokens, to so many channels each, are computed as one.

    That is fewer launches and passes over the tokens (bench/log/host-time.md), at the cost of a
    copy of the weights, so it is for narrow layers and many tokens. Where something looks at a
    single projection or has taken its place, all of them go apart.
    """
    first = layers[0]
    return (
        len(layers) > 1
        and first.in_features <= MOST_FUSED_CHANNELS
        and tokens >= FEWEST_FUSED_TOKENS
        and not _has_any_global_hook()
        and all(
            type(layer) is nn.Linear
            and "forward" not in layer.__dict__  # where accelerate and others wrap it
            and layer.weight.shape == (width, first.in_features)
            and layer.bias is not None
            and type(layer.weight) in (Tensor, nn.Parameter)
            and layer.weight.dtype == layer.bias.dtype == first.weight.dtype
            and layer.weight.requires_grad == layer.bias.requires_grad == first.weight.requires_grad
            and not any(getattr(layer, hooks) for hooks in HOOKS)
            for layer, width in zip(layers, widths, strict=True)
        )
    )
