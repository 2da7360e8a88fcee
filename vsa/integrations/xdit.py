# SPDX-License-Identifier: Apache-2.0
"""xDiT's registry of attention functions: one of its keys on ``vsa.attention``.

Its models of Wan and HunyuanVideo 1.5 hand over the grid; calls without one (cross-attention, text)
stay with the function that had the key before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

import vsa
from vsa.integrations.hosts import raster
from vsa.values.budget import TopK

Call = Callable[..., tuple[Tensor, Tensor | None]]


def install(backend: Any, topk: TopK, *, tile: tuple[int, int, int] = (4, 4, 4)) -> Call:
    """Let one of xDiT's attention backends run video self-attention sparsely.

    Args:
        backend: a key of xDiT, as ``AttentionBackendType.SDPA``; runs choose it as ever.
        topk: key tiles per query tile, as in ``vsa.attention``.
        tile: tokens per tile along (t, h, w).

    Returns:
        The function that had the key, to put back: ``register_attention_function(backend)(it)``.

    Raises:
        ValueError: a backend without a function.
    """
    from xfuser.core.distributed import attention_backend as registry

    theirs = registry.ATTENTION_FUNCTION_REGISTRY.get(backend)
    if theirs is None:
        known = ", ".join(sorted(each.name for each in registry.ATTENTION_FUNCTION_REGISTRY))
        raise ValueError(f"backend must be one of {known}, but it is {backend!r}")
    registry.register_attention_function(backend)(_function(theirs, topk, tile))
    return theirs


def _function(theirs: Call, topk: TopK, tile: tuple[int, int, int]) -> Call:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float | None,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, None] | tuple[Tensor, Tensor | None]:
        """(B, heads, S, head_dim) as xDiT calls it."""
        thw = (attention_kwargs or {}).get("thw")
        if thw is None:
            return theirs(query, key, value, dropout_p, is_causal, attention_kwargs)
        from xfuser.core.distributed import get_ring_parallel_world_size

        grid = raster.extent("thw", thw)
        if get_ring_parallel_world_size() > 1:
            raise ValueError(
                "ring_degree must be 1 with vsa, whose choice of tiles needs all keys of a head"
            )
        if is_causal or dropout_p:
            raise ValueError(
                f"is_causal and dropout_p must be off with vsa, but are {is_causal} and {dropout_p}"
            )
        if query.shape[2] != math.prod(grid):
            raise ValueError(
                f"query must hold the {math.prod(grid)} tokens of thw {grid}, but holds "
                f"{query.shape[2]}: text in the same sequence, and padding of a sequence that "
                "ranks share, are not taken"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = vsa.attention(q, k, v, topk, grid=vsa.Grid(grid, tile=tile))
        return out.transpose(1, 2), None

    return attention
