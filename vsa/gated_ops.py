# SPDX-License-Identifier: Apache-2.0
"""Coarse attention, the fine stage and combine as one PyTorch operator, for our own kernels.

As one, because all that needs a gradient then comes out of the same passes: those of the gates, of
the coarse output and of what the fine stage's backward needs of every query out of one over the
tokens; those of q, k and v through the tile means where the fine stage's gradients are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends import kernels, kernels_backward
from vsa.backends.layout import Plan
from vsa.backends.pytorch_routing import full_precision
from vsa.ops import once_only
from vsa.stages.coarse import coarse_attention
from vsa.values.grid import Grid


@torch.library.custom_op("vsa::coarse_attention", mutates_args=())
def coarse_output(q_means: Tensor, k_means: Tensor, v_means: Tensor, scale: float) -> Tensor:
    """``coarse_attention`` in full precision whatever the process allows elsewhere.

    Args:
        q_means: (B, heads, n_q, head_dim) fp32.
        k_means: (B, kv_heads, n_k, head_dim).
        v_means: like k_means.
        scale: factor of the scores.

    Returns:
        Like q_means, contiguous; without gradient.
    """
    with full_precision(q_means.device):
        return coarse_attention(q_means, k_means, v_means, scale).contiguous()


@coarse_output.register_fake
def _(q_means, k_means, v_means, scale):
    return q_means.new_empty(q_means.shape)


@torch.library.custom_op("vsa::gated_attention", mutates_args=())
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    q_means: Tensor | None,
    k_means: Tensor | None,
    v_means: Tensor | None,
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
        q_means: ``vsa.ops.tile_means`` of q, exactly when there is a ``gate_coarse``. The gradient
            of means is not theirs: it is part of those of q, k and v.
        k_means: likewise of k.
        v_means: likewise of v.
        coarse: the coarse attention's output, (B, heads, n_q, head_dim) fp32, contiguous, exactly
            when there are means. Its gradient is not its own either.
        gate_fine: of q's shape, and of its type or fp32; any strides; None for 1.
        gate_coarse: likewise; None leaves the coarse branch out.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        most: an upper bound of the tiles that a row keeps.
        scale: factor of the scores.
        backend: "hopper" or "emulated".

    Returns:
        out: (B, S_q, heads, head_dim), contiguous.
        lse: (B, heads, S_q) fp32, natural logarithm.
        fine: like out, the fine stage's part before its gate; without gradient.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    fine, lse = kernels.forward(q, k, v, words, text_valid, plan)
    out = kernels.combine(fine, kernels.Gates(gate_fine, gate_coarse, coarse), plan.grid)
    return out, lse, fine


@gated_attention.register_fake
def _(
    q, k, v, words, text_valid, q_means, k_means, v_means, coarse, gate_fine, gate_coarse,
    grid, kv_grid, most, scale, backend,
):  # fmt: skip
    return q.new_empty(q.shape), _empty_lse(q), q.new_empty(q.shape)


@torch.library.custom_op("vsa::gated_attention_inference", mutates_args=())
def gated_attention_inference(
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
) -> tuple[Tensor, Tensor]:
    """``gated_attention`` where no gradient is wanted: combine is the end of the forward kernel.

    The fine stage's part is neither written nor rounded, so that the last bit of the output may
    differ from that of ``gated_attention``.

    Returns:
        out, lse: as there, without gradients.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    gates = kernels.Gates(gate_fine, gate_coarse, coarse)
    return kernels.forward(q, k, v, words, text_valid, plan, gates)


@gated_attention_inference.register_fake
def _(
    q, k, v, words, text_valid, coarse, gate_fine, gate_coarse,
    grid, kv_grid, most, scale, backend,
):  # fmt: skip
    return q.new_empty(q.shape), _empty_lse(q)


def _empty_lse(q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("vsa::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    fine: Tensor,
    coarse: Tensor | None,
    words: Tensor,
    text_valid: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    q_means: Tensor | None,
    k_means: Tensor | None,
    v_means: Tensor | None,
    grid: Sequence[int],
    kv_grid: Sequence[int],
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``gated_attention``; arguments as it was given and returned.

    Returns:
        dq, dk, dv, dgate_fine, dgate_coarse: like what they belong to, contiguous; empty where
        that was None. What reaches q, k and v through the tile means is in the first three.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    means = [mean for mean in (q_means, k_means, v_means) if mean is not None]
    gates = kernels.Gates(gate_fine, gate_coarse, coarse)
    dq, dk, dv, *of_gates = kernels_backward.gated_backward(
        grad_out, grad_lse, q, k, v, fine, lse, words, text_valid, plan, gates, means
    )
    dgate_fine, dgate_coarse = (q.new_empty(0) if x is None else x for x in of_gates)
    return dq, dk, dv, dgate_fine, dgate_coarse


@gated_attention_backward.register_fake
def _(
    grad_out, grad_lse, q, k, v, lse, fine, coarse, words, text_valid, gate_fine, gate_coarse,
    q_means, k_means, v_means, grid, kv_grid, most, scale, backend,
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, gate_fine, gate_coarse))


gated_attention_backward.register_autograd(once_only)


def _save(ctx, inputs, output):
    q, k, v, words, text_valid, *means, coarse, gate_fine, gate_coarse = inputs[:11]
    ctx.plan = inputs[11:]
    _, lse, fine = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(fine)
    ctx.save_for_backward(
        q, k, v, lse, fine, coarse, words, text_valid, gate_fine, gate_coarse, *means
    )


def _differentiate(ctx, grad_out, grad_lse, *_):
    saved = ctx.saved_tensors
    fine, gate_fine, gate_coarse = saved[4], saved[8], saved[9]
    grad_out = torch.zeros_like(fine) if grad_out is None else grad_out
    *grads, dgate_fine, dgate_coarse = gated_attention_backward(
        grad_out, grad_lse, *saved, *ctx.plan
    )
    of_gates = (
        None if gate is None else grad
        for gate, grad in ((gate_fine, dgate_fine), (gate_coarse, dgate_coarse))
    )
    return *grads, *[None] * 6, *of_gates, *[None] * 5


gated_attention.register_autograd(_differentiate, setup_context=_save)
