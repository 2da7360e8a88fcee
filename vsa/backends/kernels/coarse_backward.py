# SPDX-License-Identifier: Apache-2.0
"""Gradients of the coarse attention over tile means, as products of small fp32 matrices.

    P = softmax(scale Q K^T)      dV = P^T dO      dS = P (dO V^T - delta)
    delta = rowsum(dO O)          dQ = scale dS K  dK = scale dS^T Q

Written out, because the backward of the fine stage needs them while it runs: they enter the
gradients of the tokens where those are rounded and stored. The same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vsa.backends.torch_coarse import full_precision

PROBABILITY_BYTES = 64 << 20
"""Probabilities that exist at a time; the gradients of scores take as much again."""


def coarse_attention_backward(
    grad: Tensor, out: Tensor, means: Sequence[Tensor], scale: float, grads: Sequence[Tensor]
) -> None:
    """Gradients of ``vsa.stages.coarse.coarse_attention``, written into ``grads``.

    Args:
        grad: of out, (B, heads, n_q, head_dim).
        out: as the forward returned.
        means: q_means (B, heads, n_q, head_dim), k_means and v_means (B, kv_heads, n_k, head_dim).
        scale: factor of the scores.
        grads: like ``means``, contiguous.
    """
    # Query heads that share a key head are rows of one matrix: sums over rows are over all of them.
    matrices = means[1].shape[0] * means[1].shape[1]
    q, k, v, grad, out, dq, dk, dv = (
        x.reshape(matrices, -1, x.shape[-1]) for x in (*means, grad, out, *grads)
    )
    delta = (grad * out).sum(-1, keepdim=True)
    dk.zero_()
    dv.zero_()
    unused = q.new_empty(1, 1, 1)
    # Autocast may surround a backward, though its forward is what it is for.
    with full_precision(q.device), torch.autocast(q.device.type, enabled=False):
        for some, rows in _slices(matrices, q.shape[1], k.shape[1] * q.element_size()):
            queries, upstream = q[some, rows], grad[some, rows]
            scores = torch.baddbmm(unused, queries, k[some].mT, beta=0, alpha=scale)
            weights = scores.softmax(-1)
            del scores
            dv[some].baddbmm_(weights.mT, upstream)
            of_scores = (upstream @ v[some].mT).sub_(delta[some, rows]).mul_(weights)
            del weights
            dq[some, rows] = torch.baddbmm(unused, of_scores, k[some], beta=0, alpha=scale)
            dk[some].baddbmm_(of_scores.mT, queries, alpha=scale)
            del of_scores


def _slices(matrices: int, rows: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Some matrices at a time where they fit, else one in several slices of rows."""
    matrices_at_once = max(1, PROBABILITY_BYTES // (rows * row_bytes))
    rows_at_once = max(1, min(rows, PROBABILITY_BYTES // row_bytes))
    for matrix in range(0, matrices, matrices_at_once):
        for row in range(0, rows, rows_at_once):
            yield slice(matrix, matrix + matrices_at_once), slice(row, row + rows_at_once)
