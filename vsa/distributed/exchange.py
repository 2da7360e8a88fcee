# SPDX-License-Identifier: Apache-2.0
"""Shards of the sequence become shards of the heads and back, one all-to-all each, differentiable.

DeepSpeed Ulysses (Jacobs et al., 2023). Everything in Video Sparse Attention is per batch element
and head, so that a rank with the whole sequence of some heads computes exactly what one process
would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_heads(xs: Sequence[Tensor], lengths: Sequence[Sequence[int]], group: Any) -> list[Tensor]:
    """Give away heads, get the rest of the sequence.

    Tensors of one type travel in one all-to-all.

    Args:
        xs: (B, S_r, heads, channels) each, this rank's tokens of all heads; any strides; every
            size but the number of tokens is the same on all ranks, and heads is a multiple of
            their number P.
        lengths: the tokens S_r of every rank, for each of ``xs``.
        group: a process group.

    Returns:
        (B, sum of S_r, heads / P, channels) each: heads [p * heads / P, (p + 1) * heads / P) on
        rank p.
    """
    ranks = dist.get_world_size(group)
    results = list(xs)
    for indices in _by_type(xs):
        parts = [xs[i].unflatten(2, (ranks, -1)).movedim(2, 0).flatten(1) for i in indices]
        sent = torch.cat(parts, dim=1)
        shapes = [
            [
                (xs[i].shape[0], lengths[i][r], xs[i].shape[2] // ranks, xs[i].shape[3])
                for i in indices
            ]
            for r in range(ranks)
        ]
        sizes = [math.prod(shape) for of_rank in shapes for shape in of_rank]
        per_rank = [sum(map(math.prod, of_rank)) for of_rank in shapes]
        got = _AllToAll.apply(sent.flatten(), [sent.shape[1]] * ranks, per_rank, group)
        pieces = got.split(sizes)
        for n, i in enumerate(indices):
            results[i] = torch.cat(
                [pieces[r * len(indices) + n].view(shapes[r][n]) for r in range(ranks)], dim=1
            )
    return results


def to_tokens(xs: Sequence[Tensor], lengths: Sequence[int], group: Any) -> list[Tensor]:
    """The way back: give away tokens, get the rest of the heads.

    Args:
        xs: (B, sum of S_r, heads / P, channels) each, any strides.
        lengths: the tokens S_r of every rank.
        group: a process group.

    Returns:
        (B, S_r, heads, channels) each, contiguous.
    """
    ranks, mine = dist.get_world_size(group), lengths[dist.get_rank(group)]
    results = list(xs)
    for indices in _by_type(xs):
        # (B, S_r, channels of all tensors) per rank: one row of numbers per token
        flat = torch.cat([xs[i].flatten(2) for i in indices], dim=2)
        batch, _, width = flat.shape
        sent = torch.cat([part.flatten() for part in flat.split(list(lengths), dim=1)])
        given = [batch * length * width for length in lengths]
        got = _AllToAll.apply(sent, given, [batch * mine * width] * ranks, group)
        rows = got.view(ranks, batch, mine, width).split(
            [xs[i].shape[2] * xs[i].shape[3] for i in indices], dim=3
        )
        for i, row in zip(indices, rows, strict=True):
            whole = row.unflatten(3, xs[i].shape[2:]).movedim(0, 2)
            results[i] = whole.flatten(2, 3).contiguous()
    return results


def _by_type(xs: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors of each type, in an order that is the same on every rank."""
    found: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        found.setdefault(x.dtype, []).append(i)
    return list(found.values())


class _AllToAll(torch.autograd.Function):
    """all_to_all_single of a flat tensor; its gradient goes back the way the numbers came."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        got = sent.new_empty(sum(taken))
        dist.all_to_all_single(got, sent, taken, given, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            _AllToAll.apply(grad.contiguous(), ctx.taken, ctx.given, ctx.group),
            None,
            None,
            None,
        )
