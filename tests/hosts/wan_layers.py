# SPDX-License-Identifier: Apache-2.0
"""One way through FastVideo's and SGLang's VSA layers, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from hosts import reference
from torch import Tensor

GRIDS = ((5, 7, 9), (4, 8, 16))
SPARSITIES = (0.0, 0.7, 0.9)
HEADS, HEAD_DIM = 2, 16


class Found(NamedTuple):
    """What a run of a layer showed: its name, the largest error, and what is allowed."""

    name: str
    error: float
    limit: float = 1e-12


def tensors(length: int, count: int = 4, heads: int = HEADS) -> list[Tensor]:
    """q, k, v and the gate, (B, S, heads, head_dim)."""
    torch.manual_seed(length)
    return [torch.randn(2, length, heads, HEAD_DIM, dtype=torch.float64) for _ in range(count)]


def error(out: Tensor, right: Tensor) -> float:
    """The largest difference."""
    if out.shape != right.shape:
        raise SystemExit(f"the layer gave {tuple(out.shape)} in place of {tuple(right.shape)}")
    return (out - right).abs().max().item()


def layers(
    module: Any, made: Any, context: Any, call: Callable[..., Tensor], path: str, ours: bool
) -> Iterator[Found]:
    """A layer on grids that tiles divide and do not, at several sparsities.

    Args:
        module: the host's module of its backend, with its builder of metadata.
        made: the host's layer.
        context: the forward context, into which the host's metadata goes.
        call: how the layer is called with q, k, v and the gate.
        path: what runs, in words.
        ours: whether the layer is to have our class in it.
    """
    if ours != type(made.attn_impl).__module__.startswith("vsa."):
        raise SystemExit(f"{path}: the layer has a {type(made.attn_impl)}")
    for grid in GRIDS:
        for sparsity in SPARSITIES:
            q, k, v, gate = tensors(grid[0] * grid[1] * grid[2])
            context.attn_metadata = module.VideoSparseAttentionMetadataBuilder().build(
                current_timestep=0,
                raw_latent_shape=(grid[0], 2 * grid[1], 2 * grid[2]),
                patch_size=(1, 2, 2),
                VSA_sparsity=sparsity,
                device=torch.device("cpu"),
            )
            out = call(made, q, k, v, gate)
            tiles = reference.video_tiles(grid, (4, 4, 4))
            topk = module._compute_cur_topk(context.attn_metadata)
            right = reference.attention(q, k, v, tiles, topk, gate)
            yield Found(f"{type(made).__name__}, {path}, {grid}, {sparsity}", error(out, right))
