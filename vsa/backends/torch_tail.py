# SPDX-License-Identifier: Apache-2.0
"""The tail in plain PyTorch: tiles that were not chosen enter the fine stage's softmax as means.

For a query of the video, each key tile j that its tile did not choose is one key more: the mean
kc_j of the tile's keys, with the mean vc_j of its values. It counts as often as the tile has
tokens:

    s_j = scale * q . kc_j + log(size_j)
    lse = log(exp(lse of the fine stage) + sum_j exp(s_j))
    out = exp(lse of the fine stage - lse) * out of the fine stage + sum_j exp(s_j - lse) vc_j

The fine stage's backward is right as it is when it gets log-sum-exp and output of the whole: its
weights are exp(s - lse), and delta = sum(grad * out) is the same number for all keys of a query.
Text queries attend everything, so they have no tail, and text is never in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.backends.tiles import accumulation_dtype
from vsa.values import bitmap
from vsa.values.problem import Problem, Saved, TailMeans, Upstream

CHUNK_BYTES = 32 << 20
"""Scores of tokens and means that exist at a time."""


def add(problem: Problem, means: TailMeans, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.backends.base.Backend.add_tail``."""
    for part in _parts(problem, means):
        queries = part.queries(problem.q)
        scores = part.scores(queries, problem.scale)
        of_fine = lse[part.rows].unsqueeze(-1)
        top = torch.maximum(scores.amax(-1, keepdim=True), of_fine)
        top.clamp_(min=torch.finfo(top.dtype).min)  # where nothing at all is attended
        weights = scores.sub_(top).exp_()
        share = (of_fine - top).exp_()
        total = weights.sum(-1, keepdim=True).add_(share)
        whole = (weights @ part.values).add_(share * out[part.tokens].to(weights.dtype))
        lse[part.rows] = (top + total.log()).squeeze(-1)
        out[part.tokens] = whole.div_(total.masked_fill_(total == 0, 1)).to(out.dtype)
    return out, lse


def add_gradients(
    upstream: Upstream, saved: Saved, problem: Problem, means: TailMeans, dq: Tensor
) -> TailMeans:
    """Gradients of ``add``: that of q is added to ``dq``, those of the means are returned.

    Arguments as in ``vsa.backends.base.Backend.add_tail_gradients``.
    """
    grad_out, grad_lse = upstream
    grads = TailMeans(*(torch.zeros_like(mean) for mean in means))
    for part in _parts(problem, means):
        lse = saved.lse[part.rows].unsqueeze(-1)
        # Tokens that attend nothing: whatever lies in their rows must not reach the means.
        idle = lse == float("-inf")
        queries = part.queries(problem.q).masked_fill(idle, 0)
        grad = grad_out[part.tokens].to(lse.dtype).masked_fill(idle, 0)
        delta = (grad * saved.out[part.tokens]).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[part.rows].unsqueeze(-1).masked_fill(idle, 0)
        weights = part.scores(queries, problem.scale).sub_(lse.masked_fill(idle, 0)).exp_()
        grads.tail_values[part.of_keys] += weights.mT @ grad
        of_scores = (grad @ part.values.mT).sub_(delta).mul_(weights).mul_(problem.scale)
        grads.tail_keys[part.of_keys] += of_scores.mT @ queries
        whole = (of_scores @ part.keys).add_(dq[part.tokens])
        dq[part.tokens] = whole.to(dq.dtype)
    return grads


def composed(
    problem: Problem, means: TailMeans, fine: Tensor, fine_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The tail of PyTorch's own operators, added to the fine stage's results.

    Any derivative of any order, at more memory.

    Args:
        problem: what the fine stage computed.
        means: tile means of the keys.
        fine: the fine stage's output, (B, S_q, heads, head_dim).
        fine_lse: its log-sum-exp, (B, heads, S_q).

    Returns:
        out, the type of ``fine``, and lse, those of the whole softmax.
    """
    grid, _ = problem.grids
    batch, _, heads, _ = problem.q.shape
    outs, lses = [], []
    for part in _parts(problem, means, whole_heads=True):
        queries = part.queries(problem.q) * problem.scale
        scores = queries @ part.keys.mT + part.bias
        of_fine = fine_lse[part.rows].unsqueeze(-1)
        scores = torch.cat((of_fine, scores.masked_fill(part.chosen, float("-inf"))), dim=-1)
        hidden = scores == float("-inf")
        nothing = hidden.all(-1, keepdim=True)  # a softmax over nothing would be NaN
        lse = scores.masked_fill(nothing, 0).logsumexp(-1, keepdim=True)
        weights = (scores.masked_fill(nothing, 0) - lse).exp().masked_fill(hidden, 0)
        outs.append(weights[:, :1] * fine[part.tokens] + weights[:, 1:] @ part.values)
        lses.append(lse.masked_fill(nothing, float("-inf")).squeeze(-1))
    out = torch.stack(outs).unflatten(0, (batch, heads)).transpose(1, 2).to(fine.dtype)
    lse = torch.stack(lses).unflatten(0, (batch, heads))
    after = grid.prefix + grid.tokens
    return (
        torch.cat((fine[:, : grid.prefix], out, fine[:, after:]), dim=1),
        torch.cat((fine_lse[..., : grid.prefix], lse, fine_lse[..., after:]), dim=-1),
    )


class _Part(NamedTuple):
    """Some tokens of the video, of one head.

    Attributes:
        tokens: their places in (B, S_q, heads, head_dim).
        rows: their places in (B, heads, S_q).
        of_keys: the place of their keys' means in (B, kv_heads, n_k, head_dim).
        keys: (n_k, head_dim), means.
        values: likewise.
        bias: (n_k,), logarithms of the tiles' sizes.
        chosen: (tokens, n_k) bool, tiles whose tokens themselves are attended, and those that a
            mask hides.
    """

    tokens: tuple[int, slice, int]
    rows: tuple[int, int, slice]
    of_keys: tuple[int, int]
    keys: Tensor
    values: Tensor
    bias: Tensor
    chosen: Tensor

    def queries(self, q: Tensor) -> Tensor:
        """(tokens, head_dim), in the type that is computed in."""
        return q[self.tokens].to(self.keys.dtype)

    def scores(self, queries: Tensor, scale: float) -> Tensor:
        """(tokens, n_k), -inf where a tile is chosen."""
        scores = torch.addmm(self.bias, queries, self.keys.mT, alpha=scale)
        return scores.masked_fill_(self.chosen, float("-inf"))


def _parts(problem: Problem, means: TailMeans, whole_heads: bool = False) -> Iterator[_Part]:
    """All tokens of the video, of one head after another."""
    grid, kv_grid = problem.grids
    batch, _, heads, _ = problem.q.shape
    group, wide = heads // problem.k.shape[2], accumulation_dtype(problem.q)
    tile = grid.tile_of_token(problem.q.device)
    bias = kv_grid.tile_sizes(problem.q.device).to(wide).log()
    mask, kv_heads = problem.mask, problem.k.shape[2]
    if mask is not None:  # zero times NaN would be NaN
        unseen = ~mask.seen(kv_heads, problem.q.device)[..., None]
        means = TailMeans(*(mean.masked_fill(unseen, 0) for mean in means))
        hidden = ~mask.matrix(grid.num_tiles, problem.q.device)
    row_bytes = kv_grid.num_tiles * wide.itemsize
    step = grid.tokens if whole_heads else max(1, CHUNK_BYTES // row_bytes)
    for b in range(batch):
        for head in range(heads):
            chosen = bitmap.unpack(problem.bitmap[b, head], kv_grid.num_tiles)
            if mask is not None:
                chosen = chosen | hidden[head % len(hidden)]
            keys, values = (mean[b, head // group].to(wide) for mean in means)
            for first in range(0, grid.tokens, step):
                some = tile[first : first + step]
                places = slice(grid.prefix + first, grid.prefix + first + len(some))
                yield _Part(
                    tokens=(b, places, head),
                    rows=(b, head, places),
                    of_keys=(b, head // group),
                    keys=keys,
                    values=values,
                    bias=bias,
                    chosen=chosen[some],
                )
