# SPDX-License-Identifier: Apache-2.0
"""The fine stage and combine as one PyTorch operator, for the project's own kernels.

As one, because the gradients of the gates, that of the coarse output and what the fine stage's
backward needs of every query come out of the same pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends import kernels, kernels_backward
from vsa.backends.layout import Plan
from vsa.grid import Grid


@torch.library.custom_op("vsa::gated_attention", mutates_args=())
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    grid: Sequence[int],
    kv_grid: Sequence[int],
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """gate_fine * fine + gate_coarse * coarse[tile of the token].

    Args:
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        words: (B, heads, n_q, words) int32, the selection's bitmap.
        text_valid: (B, prefix + suffix) bool or None for all valid.
        coarse: (B, heads, n_q, head_dim) fp32, exactly when there is a ``gate_coarse``.
        gate_fine: of q's shape, and of its type or fp32; any strides; None for 1.
        gate_coarse: likewise; None leaves the coarse branch out.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        most: an upper bound of the tiles that a row keeps.
        scale: factor of the scores.
        backend: "hopper" or "emulated".

    Returns:
        out: (B, S_q, heads, head_dim), contiguous.
        fine: likewise, the fine stage's part before its gate; without gradient.
        lse: (B, heads, S_q) fp32, natural logarithm.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    fine, lse = kernels.forward(q, k, v, words, text_valid, plan)
    out = kernels.combine(fine, coarse, gate_fine, gate_coarse, plan.grid)
    return out, fine, lse


@gated_attention.register_fake
def _(
    q, k, v, words, text_valid, coarse, gate_fine, gate_coarse, grid, kv_grid, most, scale, backend
):
    batch, length, heads, _ = q.shape
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), lse


@torch.library.custom_op("vsa::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fine: Tensor,
    lse: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    grid: Sequence[int],
    kv_grid: Sequence[int],
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``gated_attention``; arguments as it was given and returned.

    Returns:
        dq, dk, dv, dcoarse, dgate_fine, dgate_coarse: like what they belong to, contiguous; empty
        where that was None.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    gates = kernels_backward.Gates(gate_fine, gate_coarse, coarse)
    grads = kernels_backward.backward(
        grad_out, grad_lse, q, k, v, fine, lse, words, text_valid, plan, gates
    )
    of_gates = (gates.grad_coarse_rows, gates.grad_fine, gates.grad_coarse)
    dcoarse, dfine, dgate_coarse = (q.new_empty(0) if x is None else x for x in of_gates)
    return *grads, dcoarse, dfine, dgate_coarse


@gated_attention_backward.register_fake
def _(
    grad_out, grad_lse, q, k, v, fine, lse, words, text_valid, coarse, gate_fine, gate_coarse,
    grid, kv_grid, most, scale, backend,
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, coarse, gate_fine, gate_coarse))


def _save(ctx, inputs, output):
    q, k, v, words, text_valid, coarse, gate_fine, gate_coarse, *ctx.plan = inputs
    _, fine, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(fine)
    ctx.save_for_backward(q, k, v, fine, lse, words, text_valid, coarse, gate_fine, gate_coarse)


def _differentiate(ctx, grad_out, _, grad_lse):
    saved = ctx.saved_tensors
    grad_out = torch.zeros_like(saved[3]) if grad_out is None else grad_out
    *grads, dcoarse, dfine, dgate_coarse = gated_attention_backward(
        grad_out, grad_lse, *saved, *ctx.plan
    )
    given = saved[-3:]
    of_gates = [
        None if x is None else grad
        for x, grad in zip(given, (dcoarse, dfine, dgate_coarse), strict=True)
    ]
    return *grads, None, None, *of_gates, *[None] * 5


gated_attention.register_autograd(_differentiate, setup_context=_save)
