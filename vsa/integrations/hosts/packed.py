# SPDX-License-Identifier: Apache-2.0
"""MiniMax-H3's layers of FastVideo and SGLang, on the packed sequence as it lies.

Where segments and then one video are packed, and segments are kept, all runs in raster order. With
segments that compete for the budget, or reference videos with budgets of their own, the sequence
is a ``vsa.Sequence``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vsa
from vsa.integrations.hosts import large_tiles, raster
from vsa.integrations.hosts.packing import NOTE, Mixed, Packing, build
from vsa.stages import sequences
from vsa.stages.inputs import DEFAULT_TILE

__all__ = ["attend", "build", "fastvideo_class", "sglang_class", "sglang_forward"]


def attend(
    layer: Any, metadata: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, coarse: bool
) -> Any:
    """A layer's attention over (B, S, heads, head_dim).

    Args:
        layer: the host's implementation, with ``layer_idx``.
        metadata: what ``build`` made.
        q: the packed sequence, and so are k, v and the gate.
        k: see q.
        v: see q.
        gate: factor of the coarse output; None leaves it out.
        coarse: whether the coarse output of every tile is returned as well, (B, heads, n, D).
    """
    packing: Packing | None = getattr(metadata, NOTE, None)
    if packing is None:
        raise ValueError(
            "attn_metadata was made by another builder than the host's own for MiniMax-H3, so its "
            "segments and its grid are not known"
        )
    # An index that is read makes every layer's compiled code its own.
    dense = bool(metadata.dense_layers) and layer.layer_idx in metadata.dense_layers
    mixed = packing.dense if dense else packing.sparse
    if mixed is not None:
        if coarse:
            return _branches(mixed, q, k, v)
        return vsa.attention(q, k, v, mixed.topk, grid=mixed.sequence, gate_coarse=gate)
    sparsity = 0.0 if dense else metadata.VSA_sparsity
    topk = raster.tiles_kept(sparsity, raster.tiles_of(packing.grid, packing.tile))
    call = dict(grid=packing.grid, tile=packing.tile, segments=packing.segments)
    if coarse:
        return large_tiles.branches(q, k, v, topk, **call)  # type: ignore[arg-type]
    return raster.attend(q, k, v, topk, gate=gate, **call)  # type: ignore[arg-type]


def _branches(mixed: Mixed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs apart. The host's tiles are those of all flat segments, and then of videos."""
    given = sequences.Given(
        q, k, v, mixed.topk, mixed.sequence, None, DEFAULT_TILE, None, None, None, "auto"
    )
    out, coarse = sequences.branches(given)
    segments = mixed.sequence.segments
    parts = coarse.split([each.num_tiles for each in segments], dim=2)
    pairs = list(zip(segments, parts, strict=True))
    videos_last = sorted(pairs, key=lambda pair: pair[0].is_video)  # in the same order else
    return out, torch.cat([part for _, part in videos_last], dim=2)


@functools.cache
def fastvideo_class(base: type) -> type:
    """A subclass of FastVideo's ``MiniMaxH3VSAImpl`` that leaves the tokens where they are."""
    logging.getLogger(base.__module__).info(
        "vsa: MiniMaxH3VSAImpl of FastVideo runs on vsa.attention, in raster order"
    )

    class RasterMiniMaxH3(base):
        """MiniMax-H3's attention by ``vsa``, in raster order."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            causal: bool = False,
            softmax_scale: float | None = None,
            *args: Any,
            **others: Any,
        ) -> None:
            super().__init__(num_heads, head_size, causal, softmax_scale, *args, **others)
            raster.scale_of("FastVideo", head_size, causal, softmax_scale)

        def preprocess_qkv(self, qkv: Tensor, attn_metadata: Any) -> Tensor:
            """As it is."""
            return qkv

        def postprocess_output(self, output: Tensor, attn_metadata: Any) -> Tensor:
            """As it is."""
            return output

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            gate_compress: Tensor | None,
            attn_metadata: Any,
        ) -> Tensor:
            """(B, S, heads, head_dim); ``gate_compress`` None leaves the coarse output out."""
            return attend(self, attn_metadata, query, key, value, gate_compress, False)

    return RasterMiniMaxH3


@functools.cache
def sglang_class(base: Any) -> type:
    """A subclass of SGLang's ``VideoSparseAttentionH3Impl`` that leaves the tokens in place."""
    logging.getLogger(base.__module__).info(
        "vsa: VideoSparseAttentionH3Impl of SGLang runs on vsa.attention, in raster order"
    )

    class RasterVideoSparseAttentionH3(base):
        """MiniMax-H3's attention by ``vsa``, in raster order."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            causal: bool = False,
            softmax_scale: float | None = None,
            *args: Any,
            **others: Any,
        ) -> None:
            super().__init__(num_heads, head_size, causal, softmax_scale, *args, **others)
            if self.layer_idx is not None:  # else it attends text alone, by the host's dense kernel
                raster.scale_of("SGLang", head_size, causal, softmax_scale)

        def forward_varlen(self, *args: Any, **keywords: Any) -> Any:
            """As ``sglang_forward`` says."""
            return sglang_forward(base.forward_varlen, self, *args, **keywords)

    return RasterVideoSparseAttentionH3


def sglang_forward(
    theirs: Callable[..., Any],
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_host: tuple[int, ...] | None = None,
    attn_metadata: Any = None,
    gate_compress: Tensor | None = None,
    return_compress: bool = False,
) -> Any:
    """SGLang's ``forward_varlen`` of MiniMax-H3, with its own around it.

    Args:
        theirs: the host's own, for layers that attend text alone and for what it refuses.
        layer: the host's implementation.
        query: (rows, heads, head_dim), and so are key, value and gate_compress.
        key: see query.
        value: see query.
        cu_seqlens: where the packed sequence ends, and its padding.
        max_seqlen: not read.
        cu_seqlens_host: cu_seqlens on the host.
        attn_metadata: of the step.
        gate_compress: factor of the coarse output.
        return_compress: return the coarse output as well, (heads, blocks of 64, head_dim).
    """
    if layer.layer_idx is None or attn_metadata is None:
        return theirs(
            layer,
            query,
            key,
            value,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cu_seqlens_host=cu_seqlens_host,
            attn_metadata=attn_metadata,
            gate_compress=gate_compress,
            return_compress=return_compress,
        )
    used = attn_metadata.total_seq_length
    ends = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
    if ends[1] != used:
        raise ValueError(
            f"cu_seqlens must end the sequence at {used}, the rows that attn_metadata was built "
            f"for, but ends it at {ends[1]}"
        )
    if return_compress and gate_compress is not None:
        raise ValueError(
            "gate_compress must be None with return_compress, which hands the coarse output over "
            "so that it is gated later"
        )
    q, k, v = (x[None, :used] for x in (query, key, value))
    gate = None if gate_compress is None else gate_compress[None, :used]
    found = attend(layer, attn_metadata, q, k, v, gate, return_compress)
    out, coarse = found if return_compress else (found, None)
    result = torch.zeros_like(query)
    result[:used] = out[0]
    if coarse is None:
        return result
    return result, coarse[0].repeat_interleave(attn_metadata.blocks_per_tile, dim=1)
