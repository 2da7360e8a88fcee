# SPDX-License-Identifier: Apache-2.0
"""combine: out = gate_fine * fine + gate_coarse * coarse[tile of the token] (paper, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vsa.backends import named
from vsa.backends.tiles import token_valid
from vsa.operators import attention, coarse_select
from vsa.operators import fine as operators
from vsa.operators.low_precision import gated_low_precision_attention
from vsa.stages import inputs
from vsa.stages.coarse import coarse_attention
from vsa.stages.fine import fine, problem
from vsa.stages.forms import gate_like_q
from vsa.stages.inputs import Inputs
from vsa.values.budget import Budget
from vsa.values.problem import Gates, Means, TailMeans, WholeCall
from vsa.values.selection import Selection


def gated_attention(
    call: Inputs,
    selection: Selection,
    means: Sequence[Tensor],
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    tail: TailMeans | None = None,
) -> tuple[Tensor, Tensor]:
    """Coarse attention, the fine stage, and combine on top.

    A backend that fuses gates does all of it as one operator, whose kernel combines on its
    accumulators.

    Args:
        call: checked inputs.
        selection: the key tiles of every query tile.
        means: of the tiles of q, k and v, (B, heads, num_tiles, head_dim) fp32, exactly when there
            is a ``gate_coarse``; without gradient where gates are fused.
        coarse: where gates are fused, the coarse attention's output if it is there already.
        gate_fine: broadcastable to q as the user gave it, or None for 1.
        gate_coarse: broadcastable to q, or None to leave the coarse branch out.
        tail: tile means of the keys, if tiles that were not chosen enter the softmax by them.

    Returns:
        out: shape and type of q as the user gave it.
        lse: (B, heads, S) fp32, of the fine stage.
    """
    if not named(call.backend).fuses_gates or (gate_fine is None and gate_coarse is None):
        return _stage_by_stage(call, selection, means, gate_fine, gate_coarse, tail)
    if means and coarse is None:
        q_means, k_means, v_means = means
        coarse = coarse_select.coarse_attention(
            q_means, k_means, v_means, call.scale, call.backend, *(call.mask or ())
        )
    gates = Gates(_as_q(gate_fine, call), _as_q(gate_coarse, call), coarse)
    asked = problem(call, selection)
    if call.precision != "native":
        out, lse = gated_low_precision_attention(*asked, call.precision, *gates)
        return out.view(call.shape), lse
    of_tiles = Means(*means) if means else Means(None, None, None)
    if inputs.wants_gradients(call.q, call.k, call.v, gates.gate_fine, gates.gate_coarse):
        if tail is None:
            out, lse, _ = operators.gated_attention(*asked, *of_tiles, *gates)
        else:
            out, lse, _ = operators.gated_tail_attention(*asked, *tail, *of_tiles, *gates)
    elif tail is None:
        out, lse = operators.gated_attention_inference(*asked, *gates)
    else:
        out, lse = operators.gated_tail_attention_inference(*asked, *tail, *gates)
    return out.view(call.shape), lse


def whole(
    call: Inputs,
    budget: Budget,
    runs: int,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
) -> tuple[Tensor, Tensor, Selection]:
    """All stages, the choice included, as one operator of a backend that fuses gates.

    Args:
        call: checked inputs.
        budget: tiles of a row.
        runs: of a tile, whose means are scored for the choice; 1 for its mean.
        gate_fine: broadcastable to q as the user gave it, or None for 1.
        gate_coarse: broadcastable to q, or None to leave the coarse branch out.

    Returns:
        out: shape and type of q as the user gave it.
        lse: (B, heads, S) fp32, of the fine stage.
        selection: the choice.
    """
    asked = WholeCall(
        call.q,
        call.k,
        call.v,
        _as_q(gate_fine, call),
        _as_q(gate_coarse, call),
        call.text_valid,
        budget.counts,
        budget.mass,
        budget.numbers,
        call.grid.as_ints(),
        call.kv_grid.as_ints(),
        runs,
        call.scale,
        call.backend,
        *(() if call.mask is None else (*call.mask, budget.shares)),
    )
    if inputs.wants_gradients(*asked[:5]):
        out, lse, chosen, *_ = attention.attention(*asked)
    else:
        out, lse, chosen = attention.attention_inference(*asked)
    selection = Selection(
        chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, budget.most, call.mask
    )
    return out.view(call.shape), lse, selection


def _stage_by_stage(
    call: Inputs,
    selection: Selection,
    means: Sequence[Tensor],
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    tail: TailMeans | None,
) -> tuple[Tensor, Tensor]:
    """Each stage by itself; autograd puts their gradients together."""
    coarse = None
    if means:
        q_means, k_means, v_means = means
        coarse = coarse_attention(q_means, k_means, v_means, call.scale, call.backend, call.mask)
    out, lse = fine(call, selection, tail)
    whole = named(call.backend).combine(
        out.view(call.shape), coarse, gate_fine, gate_coarse, call.grid
    )
    if gate_fine is not None and call.text_valid is not None:
        # Zero times a gate is not zero where the gate of what is no token is NaN.
        real = token_valid(call.text_valid, call.grid, out.device)
        whole = whole.masked_fill(~real[..., None, None], 0)
    return whole, lse


def _as_q(gate: Tensor | None, call: Inputs) -> Tensor | None:
    return None if gate is None else gate_like_q(gate, call.shape, call.q.dtype)
