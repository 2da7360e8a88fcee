# SPDX-License-Identifier: Apache-2.0
"""The gated sum of the fine and the coarse branch in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.values.grid import Grid


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
        rows = coarse.transpose(1, 2)[:, grid.tile_of_token(coarse.device)]
        gate = gate_coarse.to(wide)
        if not grid.text:
            return (out + rows.view(fine.shape) * gate).to(fine.dtype)
        # Text tokens get none of it, whatever their gate is.
        gate = gate.expand(fine.shape).narrow(1, grid.prefix, grid.tokens)
        text = (0, 0, 0, 0, grid.prefix, grid.suffix)
        out = out + torch.nn.functional.pad(rows * gate, text)
    return out.to(fine.dtype)
