# SPDX-License-Identifier: Apache-2.0
"""Shards of the sequence become shards of the heads and back, one all-to-all each, differentiable.

DeepSpeed Ulysses (Jacobs et al., 2023). Everything in Video Sparse Attention is per batch element
and head, so that a rank with the whole sequence of some heads computes exactly what one process
would.

Numbers are copied once before they travel, into one buffer by the rank that they go to, and once
after, but where they lie so already. Within a rank's part of it the tensors follow each other,
(B, tokens, heads, channels) each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Lengths = Sequence[Sequence[int]]
"""The tokens S_r of every rank, for each of several tensors."""
Shapes = Sequence[tuple[int, ...]]


def to_heads(xs: Sequence[Tensor], lengths: Lengths, group: Any) -> list[Tensor]:
    """Give away heads, get the rest of the sequence.

    Tensors of one type travel in one all-to-all.

    Args:
        xs: (B, S_r, heads, channels) each, this rank's tokens of all heads; any strides; every
            size but the number of tokens is the same on all ranks, and heads is a multiple of
            their number P.
        lengths: the tokens S_r of every rank, for each of ``xs``.
        group: a process group.

    Returns:
        (B, sum of S_r, heads / P, channels) each, contiguous: heads [p * heads / P,
        (p + 1) * heads / P) on rank p.
    """
    return _by_type(_ToHeads, xs, lengths, group)


def to_tokens(xs: Sequence[Tensor], lengths: Sequence[int], group: Any) -> list[Tensor]:
    """The way back: give away tokens, get the rest of the heads.

    Args:
        xs: (B, sum of S_r, heads / P, channels) each, any strides.
        lengths: the tokens S_r of every rank.
        group: a process group.

    Returns:
        (B, S_r, heads, channels) each, contiguous.
    """
    return _by_type(_ToTokens, xs, [lengths] * len(xs), group)


def _by_type(way: Any, xs: Sequence[Tensor], lengths: Lengths, group: Any) -> list[Tensor]:
    """Tensors of one type together, in an order that is the same on every rank."""
    found: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        found.setdefault(x.dtype, []).append(i)
    results = list(xs)
    for indices in found.values():
        moved = way.apply([lengths[i] for i in indices], group, *(xs[i] for i in indices))
        for i, x in zip(indices, moved, strict=True):
            results[i] = x
    return results


class _ToHeads(torch.autograd.Function):
    """``to_heads`` for tensors of one type; gradients go back the way the numbers came."""

    @staticmethod
    def forward(ctx: Any, lengths: Lengths, group: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.lengths, ctx.group = lengths, group
        ranks = dist.get_world_size(group)
        sent = xs[0].new_empty(sum(x.numel() for x in xs))
        for x, part in zip(xs, _by_heads(sent, [x.shape for x in xs], ranks), strict=True):
            _copy(part, x.unflatten(2, (ranks, -1)).movedim(2, 0))
        shapes = [
            [(x.shape[0], of[r], x.shape[2] // ranks, x.shape[3]) for r in range(ranks)]
            for x, of in zip(xs, lengths, strict=True)
        ]
        got = _all_to_all(sent, [sent.numel() // ranks] * ranks, _per_rank(shapes), group)
        if _lies_by_tokens(xs):
            return (got.view(1, -1, *shapes[0][0][2:]),)
        return tuple(torch.cat(parts, dim=1) for parts in _by_tokens(got, shapes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_ToTokens.apply(ctx.lengths, ctx.group, *grads)


class _ToTokens(torch.autograd.Function):
    """``to_tokens`` likewise; every tensor may have lengths of its own."""

    @staticmethod
    def forward(ctx: Any, lengths: Lengths, group: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.lengths, ctx.group = lengths, group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        shapes = [
            [(x.shape[0], length, *x.shape[2:]) for length in of]
            for x, of in zip(xs, lengths, strict=True)
        ]
        if _lies_by_tokens(xs):
            sent = xs[0].flatten()
        else:
            sent = xs[0].new_empty(sum(x.numel() for x in xs))
            for x, of, parts in zip(xs, lengths, _by_tokens(sent, shapes), strict=True):
                for part, tokens in zip(parts, x.split(list(of), dim=1), strict=True):
                    _copy(part, tokens)
        whole = [
            (x.shape[0], of[rank], x.shape[2] * ranks, x.shape[3])
            for x, of in zip(xs, lengths, strict=True)
        ]
        size = sum(map(math.prod, whole))
        got = _all_to_all(sent, _per_rank(shapes), [size // ranks] * ranks, group)
        results = []
        for shape, part in zip(whole, _by_heads(got, whole, ranks), strict=True):
            x = got.new_empty(shape)
            _copy(x.unflatten(2, (ranks, -1)).movedim(2, 0), part)
            results.append(x)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_ToHeads.apply(ctx.lengths, ctx.group, *grads)


def _lies_by_tokens(xs: Sequence[Tensor]) -> bool:
    """Whether the tokens of one rank after those of another are the sequence as it lies."""
    return len(xs) == 1 and xs[0].shape[0] == 1


def _by_heads(flat: Tensor, shapes: Shapes, ranks: int) -> Iterator[Tensor]:
    """Parts of a buffer in which every rank has as much: (P, B, S, heads / P, channels) each."""
    rows, at = flat.view(ranks, -1), 0
    for batch, tokens, heads, channels in shapes:
        size = batch * tokens * heads * channels // ranks
        yield rows[:, at : at + size].unflatten(1, (batch, tokens, heads // ranks, channels))
        at += size


def _by_tokens(flat: Tensor, shapes: Sequence[Shapes]) -> Iterator[tuple[Tensor, ...]]:
    """Parts of a buffer, one of every rank for each tensor, of these shapes."""
    of_ranks = list(zip(*shapes, strict=True))
    parts = iter(flat.split([math.prod(shape) for of_rank in of_ranks for shape in of_rank]))
    views = [[next(parts).view(shape) for shape in of_rank] for of_rank in of_ranks]
    yield from zip(*views, strict=True)


def _per_rank(shapes: Sequence[Shapes]) -> list[int]:
    return [sum(map(math.prod, of_rank)) for of_rank in zip(*shapes, strict=True)]


def _copy(to: Tensor, x: Tensor) -> None:
    """Eight bytes at a time where both lie so: PyTorch moves strided tensors element by element."""
    if not torch.compiler.is_compiling() and _in_words(to) and _in_words(x):
        to, x = to.view(torch.int64), x.view(torch.int64)
    to.copy_(x)


def _in_words(x: Tensor) -> bool:
    places = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    return x.stride(-1) == 1 and all(n * x.element_size() % 8 == 0 for n in places)


def _all_to_all(sent: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
    got = sent.new_empty(sum(taken))
    dist.all_to_all_single(got, sent, taken, given, group=group)
    return got
