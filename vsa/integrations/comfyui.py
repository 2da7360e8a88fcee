# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's attention hook: one function for ``transformer_options``.

``model.model_options["transformer_options"]["optimized_attention_override"] = override(topk=0.1)``
makes self-attention of Wan sparse, whose model writes its grid into the same options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

import vsa
from vsa.integrations.hosts import raster
from vsa.values.budget import TopK

Override = Callable[..., Tensor]
TEXT = 512
"""Tokens of text that ComfyUI gives Wan at least."""


def override(
    topk: TopK,
    *,
    tile: tuple[int, int, int] = (4, 4, 4),
    dense_blocks: Collection[int] = (),
    previous: Override | None = None,
) -> Override:
    """A function for ``optimized_attention_override``.

    Args:
        topk: key tiles per query tile, as in ``vsa.attention``.
        tile: tokens per tile along (t, h, w).
        dense_blocks: blocks of the model whose attention stays dense.
        previous: the override that was there, which gets every call that stays dense.

    Returns:
        A function that computes self-attention of a video, and hands on what is none: calls
        without a grid, of other keys than queries, and those of ``dense_blocks``.
    """

    def attention(
        func: Override,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **others: Any,
    ) -> Tensor:
        """As ComfyUI calls it: (B, S, heads * head_dim), or (B, heads, S, head_dim)."""
        options = others.get("transformer_options") or {}
        sizes, axis = options.get("grid_sizes"), 2 if skip_reshape else 1
        block = options.get("block_index")
        if sizes is None or q.shape[axis] != k.shape[axis] or block in dense_blocks:
            run = func if previous is None else lambda *a, **b: previous(func, *a, **b)
            return run(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **others,
            )
        if mask is not None:
            raise ValueError("mask must be None in sparse self-attention; use dense_blocks")
        grid = raster.extent("grid_sizes", sizes)
        if q.shape[axis] != math.prod(grid):
            raise ValueError(
                f"the sequence must hold the {math.prod(grid)} tokens of grid_sizes {grid}, but "
                f"holds {q.shape[axis]}: reference images and poses beside the video are not taken"
            )
        if q.shape[axis] == TEXT:
            raise ValueError(
                f"a video of {TEXT} tokens cannot be told from Wan's text of {TEXT}, which it "
                "attends in the same blocks: take another size, or name them in dense_blocks"
            )
        if skip_reshape:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            for name, x in (("q", q), ("k", k), ("v", v)):
                if x.ndim != 3 or x.shape[-1] % heads:
                    raise ValueError(
                        f"{name} must be (B, S, heads * head_dim) with {heads} heads where "
                        f"skip_reshape is False, but its shape is {tuple(x.shape)}"
                    )
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        out = vsa.attention(
            q, k, v, topk, grid=vsa.Grid(grid, tile=tile), scale=others.get("scale")
        )
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    return attention
