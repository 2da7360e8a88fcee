# SPDX-License-Identifier: Apache-2.0
"""Shards of the sequence become shards of the heads and back, by all-to-alls that run beside work.

DeepSpeed Ulysses (Jacobs et al., 2023). Everything in Video Sparse Attention is per batch element
and head, so that a rank with the whole sequence of some heads computes exactly what one process
would.

Each way has two ends, sending and taking. What sending returns are buffers that are still on their
way; only taking makes the current stream wait for them, and no end makes the host wait for a GPU.
The gradient of taking sends, and that of sending takes: autograd, which runs nodes in the opposite
order, has as much between the two as the forward had.

Buffers come from PyTorch's allocator. What arrives is what autograd saves, so that it cannot be
memory that the next layer writes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vsa.distributed.parcels import Member, Parcel, Sharded, parcels

Transport = Literal["plain", "functional"]
"""``all_to_all_single`` of torch.distributed, or the operators that torch.compile makes of it."""


@dataclass(frozen=True)
class Route:
    """What is exchanged, known before any tensor is.

    Attributes:
        tensors: their shards.
        shapes: (B, S_r, P * heads, channels) of each on this rank.
        parcels: in the order in which they are sent.
        groups: for each group of heads, the numbers of its parcels.
    """

    tensors: tuple[Sharded, ...]
    shapes: tuple[tuple[int, ...], ...]
    parcels: tuple[Parcel, ...]
    groups: tuple[tuple[int, ...], ...]


def route(
    tensors: Sequence[Sharded],
    rank: int,
    cuts: Sequence[Sequence[slice]],
    first: Sequence[int] = (),
) -> Route:
    """How tensors travel, in groups of heads.

    Args:
        tensors: their shards.
        rank: this one.
        cuts: for each group, which of a rank's heads of each tensor are in it.
        first: numbers of tensors that travel apart from the others in the first group, before them.
    """
    found: list[Parcel] = []
    groups: list[tuple[int, ...]] = []
    for cut in cuts:
        members = [Member(number, heads) for number, heads in enumerate(cut)]
        sooner = [each for each in members if not groups and each.number in first]
        later = [each for each in members if each not in sooner]
        new = [p for part in (sooner, later) for p in parcels(tensors, part, rank)]
        groups.append(tuple(range(len(found), len(found) + len(new))))
        found += new
    shapes = [(x.batch, x.lengths[rank], len(x.lengths) * x.heads, x.channels) for x in tensors]
    return Route(tuple(tensors), tuple(shapes), tuple(found), tuple(groups))


class Exchange:
    """Tensors of one call on their way, and their gradients on the way back.

    Args:
        route: what is exchanged.
        group: process group.
        transport: how, outside of torch.compile.
    """

    def __init__(self, route: Route, group: Any, transport: Transport = "plain") -> None:
        self.route, self.group, self.transport = route, group, transport
        self._works: dict[int, Any] = {}

    def send_heads(self, xs: Sequence[Tensor], backwards: bool = False) -> list[Tensor]:
        """Send away the heads of other ranks, parcel by parcel.

        Args:
            xs: (B, S_r, heads, channels) each, this rank's tokens of all heads; any strides.
            backwards: whether the last parcel is sent first.

        Returns:
            A buffer for each parcel.
        """
        numbers = range(len(self.route.parcels))
        found = {}
        for number in reversed(numbers) if backwards else numbers:
            parcel = self.route.parcels[number]
            sent = parcel.pack_heads(xs)
            found[number] = self._start(number, sent, parcel.by_heads, parcel.by_tokens)
        return [found[number] for number in numbers]

    def take_heads(
        self, group: int, buffers: Sequence[Tensor], later: Sequence[int] = ()
    ) -> list[Tensor]:
        """All tokens of the heads of a group.

        Args:
            group: number of the group.
            buffers: of its parcels.
            later: parcels that ``wait`` will be called for.

        Returns:
            (B, S, heads, channels) each, last dimension contiguous, in the order of the tensors.
        """
        found: dict[int, Tensor] = {}
        for number, buffer in zip(self.route.groups[group], buffers, strict=True):
            parcel = self.route.parcels[number]
            if number not in later:
                buffer = self.wait(number, buffer)
            xs = parcel.unpack_tokens(buffer[: parcel.taken])
            found |= {m.number: x for m, x in zip(parcel.members, xs, strict=True)}
        return [found[number] for number in sorted(found)]

    def send_tokens(self, group: int, xs: Sequence[Tensor]) -> list[Tensor]:
        """Send away the tokens of other ranks, of the heads of a group; a buffer for each parcel.

        Args:
            group: number of the group.
            xs: (B, S, heads, channels) each, any strides, in the order of the tensors.
        """
        found = []
        for number in self.route.groups[group]:
            parcel = self.route.parcels[number]
            sent = parcel.pack_tokens([xs[member.number] for member in parcel.members])
            found.append(self._start(number, sent, parcel.by_tokens, parcel.by_heads))
        return found

    def take_tokens(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """All heads of this rank's tokens, (B, S_r, heads, channels) each, contiguous.

        Args:
            buffers: of all parcels.
        """
        each = zip(self.route.tensors, self.route.shapes, strict=True)
        xs = [buffers[0].new_empty(shape, dtype=tensor.dtype) for tensor, shape in each]
        for number, (parcel, buffer) in enumerate(zip(self.route.parcels, buffers, strict=True)):
            parcel.unpack_heads(self.wait(number, buffer)[: parcel.given], xs)
        return xs

    def wait(self, number: int, buffer: Tensor) -> Tensor:
        """Make the current stream wait for a parcel; its buffer then holds what was sent."""
        work = self._works.pop(number, None)
        if work is not None:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(self._sentence()) from error
        elif self._is_functional():
            return torch.ops._c10d_functional.wait_tensor(buffer)
        return buffer

    def _is_functional(self) -> bool:
        return self.transport == "functional" or torch.compiler.is_compiling()

    def _start(
        self, number: int, sent: Tensor, given: Sequence[int], taken: Sequence[int]
    ) -> Tensor:
        """A buffer of a parcel's ``room``, whichever way it goes: gradients are as large."""
        parcel = self.route.parcels[number]
        try:
            if self._is_functional() and parcel.is_even:
                name = self.group.group_name
                op = torch.ops._c10d_functional.all_to_all_single
                return op(sent, list(taken), list(given), name)
            got = sent.new_empty(parcel.room)
            part = got
            splits: tuple[list[int] | None, list[int] | None] = None, None
            if not parcel.is_even:
                part, splits = got[: sum(taken)], (list(taken), list(given))
            if self._is_functional():  # there is no room in what its operators return
                dist.all_to_all_single(part, sent, *splits, group=self.group)
                return got
            work = dist.all_to_all_single(part, sent, *splits, group=self.group, async_op=True)
        except RuntimeError as error:
            raise RuntimeError(self._sentence()) from error
        self._works[number] = work
        return got

    def _sentence(self) -> str:
        ranks = len(self.route.tensors[0].lengths)
        return (
            f"group could not finish an all-to-all of its {ranks} ranks, on rank "
            f"{dist.get_rank(self.group)} of it: another rank has ended, or has called with other "
            "arguments, and the first error of all ranks says why"
        )


def send_heads(exchange: Exchange, xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """``Exchange.send_heads``, differentiable; and so are the next three."""
    if not _wants_gradients(xs):
        return exchange.send_heads(xs)
    if torch.compiler.is_compiling():
        xs = [x.view_as(x) for x in xs]  # dynamo refuses a tensor that comes twice
    return _SendHeads.apply(exchange, *xs)


def take_heads(
    exchange: Exchange, group: int, buffers: Sequence[Tensor], later: Sequence[int] = ()
) -> Sequence[Tensor]:
    """``Exchange.take_heads``."""
    if not _wants_gradients(buffers):
        return exchange.take_heads(group, buffers, later)
    return _TakeHeads.apply(exchange, group, later, *buffers)


def send_tokens(exchange: Exchange, group: int, xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """``Exchange.send_tokens``."""
    if not _wants_gradients(xs):
        return exchange.send_tokens(group, xs)
    return _SendTokens.apply(exchange, group, *xs)


def take_tokens(exchange: Exchange, buffers: Sequence[Tensor]) -> Sequence[Tensor]:
    """``Exchange.take_tokens``."""
    if not _wants_gradients(buffers):
        return exchange.take_tokens(buffers)
    return _TakeTokens.apply(exchange, *buffers)


def _wants_gradients(xs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)


class _SendHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.send_heads(xs))

    @staticmethod
    def backward(ctx: Any, *buffers: Tensor) -> tuple[Any, ...]:
        _once()
        return None, *ctx.exchange.take_tokens(buffers)


class _TakeHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, group: int, later: Sequence[int], *buffers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group = exchange, group
        return tuple(exchange.take_heads(group, buffers, later))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _once()
        return None, None, None, *ctx.exchange.send_tokens(ctx.group, grads)


class _SendTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, group: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group = exchange, group
        return tuple(exchange.send_tokens(group, xs))

    @staticmethod
    def backward(ctx: Any, *buffers: Tensor) -> tuple[Any, ...]:
        _once()
        return None, None, *ctx.exchange.take_heads(ctx.group, buffers)


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *buffers: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.take_tokens(buffers))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _once()
        # The nodes behind this one run from the last group to the first.
        return None, *ctx.exchange.send_heads(grads, backwards=True)


def _once() -> None:
    """An all-to-all has no gradient that autograd could follow by itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph must be False where the sequence is sharded: ulysses_attention can be "
            "differentiated once"
        )


def to_heads(
    xs: Sequence[Tensor], lengths: Sequence[Sequence[int]], group: Any
) -> Sequence[Tensor]:
    """Give away heads, get the rest of the sequence, with nothing in between.

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
    exchange = Exchange(_one_group(xs, lengths, dist.get_world_size(group), group), group)
    return take_heads(exchange, 0, send_heads(exchange, xs))


def to_tokens(xs: Sequence[Tensor], lengths: Sequence[int], group: Any) -> Sequence[Tensor]:
    """The way back: give away tokens, get the rest of the heads.

    Args:
        xs: (B, sum of S_r, heads / P, channels) each, any strides.
        lengths: the tokens S_r of every rank.
        group: a process group.

    Returns:
        (B, S_r, heads, channels) each, contiguous.
    """
    exchange = Exchange(_one_group(xs, [lengths] * len(xs), 1, group), group)
    return take_tokens(exchange, send_tokens(exchange, 0, xs))


def _one_group(
    xs: Sequence[Tensor], lengths: Sequence[Sequence[int]], shares: int, group: Any
) -> Route:
    """All in one; a rank's heads are this share of those of ``xs``."""
    tensors = [
        Sharded(x.shape[2] // shares, x.shape[3], x.shape[0], x.dtype, tuple(of))
        for x, of in zip(xs, lengths, strict=True)
    ]
    cut = [slice(0, tensor.heads) for tensor in tensors]
    return route(tensors, dist.get_rank(group), [cut])
