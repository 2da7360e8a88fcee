# SPDX-License-Identifier: Apache-2.0
"""combine: out = gate_fine * fine + gate_coarse * coarse[tile of the token] (paper, 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.grid import Grid


def combine(
    fine: Tensor,
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    grid: Grid,
) -> Tensor:
    """Gated sum of the two branches, computed in fp32 (fp64 for fp64 inputs) and rounded once.

    Args:
        fine: (B, length, heads, head_dim), or (B, T, H, W, heads, head_dim) like the gates.
        coarse: (B, heads, num_tiles, head_dim), or None to leave the branch out; text tokens get
            none of it.
        gate_fine: broadcastable to ``fine``, or None for 1.
        gate_coarse: broadcastable to ``fine``; None exactly when ``coarse`` is.
        grid: the grid of the queries.

    Returns:
        Shape and type of ``fine``.
    """
    if gate_fine is None and coarse is None:
        return fine
    wide = torch.promote_types(fine.dtype, torch.float32)
    out = fine.to(wide)
    if gate_fine is not None:
        out = out * gate_fine.to(wide)
    if coarse is not None and gate_coarse is not None:
        out = out + _broadcast_to_tokens(coarse, grid).view(fine.shape) * gate_coarse.to(wide)
    return out.to(fine.dtype)


def _broadcast_to_tokens(coarse: Tensor, grid: Grid) -> Tensor:
    """Every token gets its tile's row, text tokens zeros: -> (B, length, heads, head_dim)."""
    rows = coarse.transpose(1, 2)[:, grid.tile_of_token(coarse.device)]
    return (
        torch.nn.functional.pad(rows, (0, 0, 0, 0, grid.prefix, grid.suffix)) if grid.text else rows
    )
