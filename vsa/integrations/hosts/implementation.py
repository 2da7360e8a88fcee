# SPDX-License-Identifier: Apache-2.0
"""The attention class of FastVideo and SGLang, in raster order.

Both hosts call ``preprocess_qkv``, ``forward`` and ``postprocess_output`` of a class that they ask
their backend for. Theirs gathers q, k, v and the gate into padded tiles, transposes each, and
gathers the output back. The class made here leaves the tokens where they are.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from typing import Any

from torch import Tensor
from torch.nn import functional

from vsa.integrations.hosts import raster


@functools.cache
def in_raster_order(base: type, host: str) -> type:
    """A subclass of the host's ``VideoSparseAttentionImpl`` that calls ``vsa.attention``.

    Args:
        base: the host's class. Its module holds VSA_TILE_SIZE, and its instances ``sp_size``.
        host: its name, for error sentences.
    """
    module = sys.modules[base.__module__]
    logging.getLogger(base.__module__).info(
        "vsa: VideoSparseAttentionImpl of %s runs on vsa.attention, in raster order", host
    )

    class RasterVideoSparseAttention(base):
        """Video Sparse Attention of a host's layer by ``vsa.attention``, in raster order."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            causal: bool = False,
            softmax_scale: float | None = None,
            *args: Any,
            **others: Any,
        ) -> None:
            scale = raster.scale_of(host, head_size, causal, softmax_scale)
            super().__init__(num_heads, head_size, causal, scale, *args, **others)

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
            gate_compress: Tensor | None = None,
            attn_metadata: Any = None,
        ) -> Tensor:
            """Attention over the whole video, (B, S, heads, head_dim) in raster order.

            ``gate_compress`` None adds the coarse output with weight 1, as the host's kernels do.
            """
            if attn_metadata is None:
                raise ValueError(
                    f"attn_metadata is None: {host} builds it only where VIDEO_SPARSE_ATTN was "
                    "chosen for the whole run before the model was made"
                )
            grid = raster.extent("dit_seq_shape", attn_metadata.dit_seq_shape)
            tile = raster.extent("VSA_TILE_SIZE", module.VSA_TILE_SIZE)
            topk = raster.tiles_kept(attn_metadata.VSA_sparsity, raster.tiles_of(grid, tile))
            gate = query.new_ones(1) if gate_compress is None else gate_compress
            # A sequence that ranks share ends in fewer tokens of padding than there are ranks.
            tokens = math.prod(grid)
            padding = query.shape[1] - tokens
            if 0 < padding < self.sp_size:
                query, key, value = (x[:, :tokens] for x in (query, key, value))
                gate = gate if gate_compress is None else gate[:, :tokens]
            out = raster.attend(query, key, value, topk, grid=grid, tile=tile, gate=gate)
            if 0 < padding < self.sp_size:
                out = functional.pad(out, (0, 0, 0, 0, 0, padding))
            return out

    return RasterVideoSparseAttention
