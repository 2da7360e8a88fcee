# SPDX-License-Identifier: Apache-2.0
"""coarse: the mean of every tile, and attention from tile means to tile means.

Paper, section 2.2, equation of the coarse stage: qc_i, kc_j, vc_j are means over tiles, s_ij =
scale * qc_i . kc_j, a_i = softmax_j(s_ij), oc_i = sum_j a_ij vc_j. Arithmetic is fp32 whatever the
input (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from vsa import ops
from vsa.backends import pytorch_routing
from vsa.values import transforms
from vsa.values.grid import Grid


def tile_means(xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Mean of the tokens of every tile, straight from the raster layout, all tensors in one go.

    Args:
        xs: (B, length, heads, head_dim) each, any strides; text tokens take no part.
        grids: the grid of each.

    Returns:
        (B, heads, num_tiles, head_dim) each, fp32 or wider; differentiable.
    """
    if any(map(transforms.is_transformed, xs)):
        return [pytorch_routing.tile_means(x, grid) for x, grid in zip(xs, grids, strict=True)]
    return ops.tile_means(list(xs), [number for grid in grids for number in grid.as_ints()])


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
    if (group := q_means.shape[1] // k_means.shape[1]) > 1:
        k_means, v_means = (x.repeat_interleave(group, dim=1) for x in (k_means, v_means))
    if any(map(transforms.is_transformed, (q_means, k_means, v_means))):
        return ((q_means @ k_means.mT) * scale).softmax(-1) @ v_means  # the fused one has no jvp
    return functional.scaled_dot_product_attention(q_means, k_means, v_means, scale=scale)
