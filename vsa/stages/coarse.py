# SPDX-License-Identifier: Apache-2.0
"""coarse: the mean of every tile, and attention from tile means to tile means.

Paper, section 2.2, equation of the coarse stage: qc_i, kc_j, vc_j are means over tiles, s_ij =
scale * qc_i . kc_j, a_i = softmax_j(s_ij), oc_i = sum_j a_ij vc_j. Arithmetic is fp32 whatever the
input (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vsa.backends import named
from vsa.operators import coarse_select
from vsa.stages.inputs import Inputs
from vsa.values.grid import Grid
from vsa.values.tile_mask import TileMask


def tile_means(xs: Sequence[Tensor], grids: Sequence[Grid], backend: str) -> list[Tensor]:
    """Mean of the tokens of every tile, straight from the raster layout, all tensors in one go.

    Args:
        xs: (B, length, heads, head_dim) each, any strides; text tokens take no part.
        grids: the grid of each.
        backend: name of the backend, never "auto".

    Returns:
        (B, heads, num_tiles, head_dim) each, fp32 or wider; differentiable.
    """
    who = named(backend)
    if "tile_means" in who.composed:
        return who.tile_means(xs, grids)
    ints: list[int] = []
    for grid in grids:
        ints += grid.as_ints()
    return coarse_select.tile_means(list(xs), ints, backend)


def coarse_attention(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    scale: float,
    backend: str,
    mask: TileMask | None = None,
) -> Tensor:
    """Attention of tile means to those that each may choose, differentiable.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        v_means: (B, kv_heads, n_k, head_dim).
        scale: factor of the scores.
        backend: name of the backend, never "auto".
        mask: which tiles a row may choose, None for all.

    Returns:
        (B, heads, n_q, head_dim), the type of the means; zeros where a row may choose nothing.
    """
    return named(backend).coarse_attention(q_means, k_means, v_means, scale, mask)


def for_means(call: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, without gradient where that of their means does not go through autograd."""
    if named(call.backend).fuses_gates:
        return call.q.detach(), call.k.detach(), call.v.detach()
    return call.q, call.k, call.v
