# SPDX-License-Identifier: Apache-2.0
"""combine: out = gate_fine * fine + gate_coarse * coarse[tile of the token] (paper, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsa import gated_ops
from vsa.backends.layout import token_valid
from vsa.stages import inputs
from vsa.stages.coarse import coarse_attention
from vsa.stages.fine import fine, most_kept
from vsa.values.grid import Grid

if TYPE_CHECKING:
    from vsa.stages.select import Selection


def is_one_operator(backend: str) -> bool:
    """Whether the backend's kernels do coarse, fine and combine, and their gradients, as one."""
    return backend in ("hopper", "emulated")


def gated_attention(
    call: inputs.Inputs,
    selection: Selection,
    means: Sequence[Tensor],
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Coarse attention, the fine stage, and combine on top.

    Our own kernels do all of it as one operator; where nothing needs a gradient the forward kernel
    combines on its accumulators, so that the last bit may differ from what training computes.

    Args:
        call: checked inputs.
        selection: the key tiles of every query tile.
        means: of the tiles of q, k and v, (B, heads, num_tiles, head_dim) fp32, exactly when there
            is a ``gate_coarse``; without gradient where ``is_one_operator``.
        coarse: where ``is_one_operator``, the coarse attention's output if it is there already.
        gate_fine: broadcastable to q as the user gave it, or None for 1.
        gate_coarse: likewise, or None to leave the coarse branch out.

    Returns:
        out: shape and type of q as the user gave it.
        lse: (B, heads, S) fp32, of the fine stage.
    """
    if not is_one_operator(call.backend) or (gate_fine is None and gate_coarse is None):
        coarse = coarse_attention(means[0], means[1], means[2], call.scale) if means else None
        out, lse = fine(call, selection)
        whole = combine(out.view(call.shape), coarse, gate_fine, gate_coarse, call.grid)
        if gate_fine is not None and call.text_valid is not None:
            # Zero times a gate is not zero where the gate of what is no token is NaN.
            real = token_valid(call.text_valid, call.grid, out.device)
            whole = whole.masked_fill(~real[..., None, None], 0)
        return whole, lse
    if means and coarse is None:
        coarse = gated_ops.coarse_output(means[0], means[1], means[2], call.scale)
    gates = _for_kernels(gate_fine, call), _for_kernels(gate_coarse, call)
    tensors = call.q, call.k, call.v, selection.bitmap, call.text_valid
    rest = (
        coarse,
        *gates,
        call.grid.as_ints(),
        call.kv_grid.as_ints(),
        most_kept(selection),
        call.scale,
        call.backend,
    )
    if inputs.wants_gradients(call.q, call.k, call.v, *(x for x in gates if x is not None)):
        out, lse, _ = gated_ops.gated_attention(*tensors, *(means or (None, None, None)), *rest)
    else:
        out, lse = gated_ops.gated_attention_inference(*tensors, *rest)
    return out.view(call.shape), lse


def _for_kernels(gate: Tensor | None, call: inputs.Inputs) -> Tensor | None:
    """A gate in the flat shape of q: a view, whose gradient PyTorch sums over what was broadcast.

    One that is broadcast and wants a gradient goes in fp32, so that the terms of that sum are not
    rounded.
    """
    if gate is None:
        return None
    sums = inputs.wants_gradients(gate) and (gate.shape != call.shape or 0 in gate.stride())
    gate = gate.float() if sums or gate.dtype != call.q.dtype else gate
    if call.text_valid is not None and gate.ndim > 2 and gate.shape[-3] > 1:
        # The kernels multiply by it what is zero there, which a gate of NaN would undo.
        real = token_valid(call.text_valid, call.grid, gate.device)
        gate = gate.masked_fill(~real[..., None, None], 0)
    return gate.expand(call.shape).reshape(call.q.shape)


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
