# SPDX-License-Identifier: Apache-2.0
"""coarse: the mean of every tile, and attention from tile means to tile means.

Paper, section 2.2, equation of the coarse stage: qc_i, kc_j, vc_j are means over tiles, s_ij =
scale * qc_i . kc_j, a_i = softmax_j(s_ij), oc_i = sum_j a_ij vc_j. Arithmetic is fp32 whatever the
input (fp64 for fp64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vsa.grid import Grid


def tile_means(x: Tensor, grid: Grid) -> Tensor:
    """Mean of the tokens of every tile, straight from the raster layout.

    Args:
        x: (B, length, heads, head_dim), any strides; text tokens take no part.
        grid: the grid of x.

    Returns:
        (B, heads, num_tiles, head_dim), fp32 or wider.
    """
    video = x[:, grid.prefix : grid.prefix + grid.tokens].unflatten(1, grid.shape)
    for axis, size in reversed(list(enumerate(grid.box, start=1))):
        video = _sum_boxes(video, axis, size)
    sizes = grid.tile_sizes(x.device)[:, None, None]
    return (video.flatten(1, 3) / sizes).transpose(1, 2)


def _sum_boxes(x: Tensor, axis: int, size: int) -> Tensor:
    """Sums of ``size`` neighbours along ``axis``; the last one takes what is left."""
    dtype = accumulation_dtype(x)
    whole = x.shape[axis] // size * size
    sums = (
        x.narrow(axis, 0, whole).unflatten(axis, (whole // size, size)).sum(axis + 1, dtype=dtype)
    )
    if whole == x.shape[axis]:
        return sums
    rest = x.narrow(axis, whole, x.shape[axis] - whole).sum(axis, keepdim=True, dtype=dtype)
    return torch.cat((sums, rest), axis)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type that means, scores and softmax are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def coarse_attention(q_means: Tensor, k_means: Tensor, v_means: Tensor, scale: float) -> Tensor:
    """Dense attention of tile means to tile means.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        v_means: (B, kv_heads, n_k, head_dim).
        scale: factor of the scores.

    Returns:
        (B, heads, n_q, head_dim), the type of the means.
    """
    group = q_means.shape[1] // k_means.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k_means, v_means))
    return functional.scaled_dot_product_attention(q_means, keys, values, scale=scale)
