# SPDX-License-Identifier: Apache-2.0
"""Gradients of the coarse attention over tile means, as products of small fp32 matrices.

    P = softmax(scale Q K^T)      dV = P^T dO      dS = P (dO V^T - delta)
    delta = rowsum(dO O)          dQ = scale dS K  dK = scale dS^T Q

Four launches: the scores, their softmax, the gradient of the scores, and the other three. Written
out, because the backward of the fine stage needs them while it runs: they enter the gradients of
the tokens where those are rounded and stored. The same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends.kernels.coarse_calls import gradient_calls, score_numbers
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.masked_calls import clean, located
from vsa.backends.kernels.tensors import as_matrices
from vsa.backends.torch_padded import without_empty
from vsa.values.tile_mask import TileMask

PROBABILITY_BYTES = 64 << 20
"""Probabilities that exist at a time; the gradients of scores take as much again."""


def coarse_attention_backward(
    machine: Machine,
    grad: Tensor,
    out: Tensor,
    means: Sequence[Tensor],
    scale: float,
    grads: Sequence[Tensor],
    mask: TileMask | None = None,
) -> None:
    """Gradients of ``vsa.stages.coarse.coarse_attention``, written into ``grads``.

    Args:
        machine: what runs the kernels.
        grad: of out, (B, heads, n_q, head_dim) fp32, as everything here.
        out: as the forward returned.
        means: q_means (B, heads, n_q, head_dim), k_means and v_means (B, kv_heads, n_k, head_dim).
        scale: factor of the scores.
        grads: like ``means``, contiguous.
        mask: which tiles a row may choose, None for all.
    """
    means = clean(mask, *means)
    matrices, columns = means[1].shape[0] * means[1].shape[1], means[1].shape[2]
    upstream, coarse, *of_means = (as_matrices(x, matrices) for x in (grad, out, *means, *grads))
    numbers = score_numbers(matrices, upstream.shape[1], columns, PROBABILITY_BYTES)
    scratch = [grad.new_empty(numbers) for _ in range(2)]
    for call in gradient_calls(
        upstream,
        coarse,
        of_means[:3],
        scale,
        of_means[3:],
        scratch,
        PROBABILITY_BYTES,
        located(mask, means[0].shape[2]),
    ):
        machine.run(call, grad.device)


def without_empty_backward(
    kv_sizes: Tensor,
    machine: Machine,
    grad: Tensor,
    out: Tensor,
    means: Sequence[Tensor],
    scale: float,
    grads: Sequence[Tensor],
) -> None:
    """``coarse_attention_backward`` where key tiles without a token took no part.

    Args:
        kv_sizes: (n_k,) int32, real tokens of each key tile; the rest as there.
        machine: see there.
        grad: see there.
        out: see there.
        means: see there.
        scale: see there.
        grads: see there.
    """
    queries, keys = without_empty(means[0], means[1], kv_sizes)
    wider = [queries, keys, means[2]]
    of_wider = [torch.empty_like(mean) for mean in wider]
    coarse_attention_backward(machine, grad, out, wider, scale, of_wider)
    for to, found in zip(grads, of_wider, strict=True):
        to.copy_(found[..., : to.shape[-1]])
