# SPDX-License-Identifier: Apache-2.0
"""Parcels: tensors that travel in one all-to-all, and how they lie in its buffers.

Split by heads, a buffer is (P, B, S_r, heads, channels): this rank's tokens of the heads of each of
P ranks. Split by tokens, it is (B, S_r, heads, channels) of every rank r in turn: all tokens of one
rank's heads. Tensors of a parcel lie beside each other along the axis of heads. So with one batch
element what arrives split by tokens is the whole sequence as it lies, and its tensors are views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Sharded(NamedTuple):
    """What all ranks know of a tensor that is exchanged.

    Attributes:
        heads: of each rank, once they are sharded.
        channels: of a head.
        batch: batch elements.
        dtype: of its numbers.
        lengths: tokens S_r of every rank, while the sequence is sharded.
    """

    heads: int
    channels: int
    batch: int
    dtype: torch.dtype
    lengths: tuple[int, ...]


class Member(NamedTuple):
    """A tensor in a parcel: its number, and which of a rank's heads travel."""

    number: int
    heads: slice


@dataclass(frozen=True)
class Parcel:
    """Tensors of one type and of as many tokens and channels, in one all-to-all.

    Attributes:
        members: what travels.
        batch: batch elements.
        channels: of a head.
        lengths: tokens of every rank.
        own: tokens of this rank.
        by_heads: numbers for or from every rank where a buffer is split by heads.
        by_tokens: likewise where it is split by tokens.
        places: where the heads of each member begin and end among those of all.
        given: numbers of a buffer that is split by heads.
        taken: likewise by tokens.
        room: numbers of the larger of both.
        is_even: whether all ranks have as many tokens.
    """

    members: tuple[Member, ...]
    batch: int
    channels: int
    lengths: tuple[int, ...]
    own: int
    by_heads: tuple[int, ...]
    by_tokens: tuple[int, ...]
    places: tuple[slice, ...]
    given: int
    taken: int
    room: int
    is_even: bool

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def heads(self) -> int:
        """Of all members, of one rank."""
        return self.places[-1].stop

    def pack_heads(self, xs: Sequence[Tensor]) -> Tensor:
        """Members (B, S_own, P * heads, channels) of ``xs`` -> a buffer that is split by heads."""
        flat = xs[self.members[0].number].new_empty(self.given)
        for part, member in zip(self._split_by_heads(flat), self.members, strict=True):
            copy(part, _of_ranks(xs[member.number], self.ranks, member.heads))
        return flat

    def unpack_heads(self, flat: Tensor, xs: Sequence[Tensor]) -> None:
        """Write a buffer that is split by heads into the members of ``xs``."""
        for part, member in zip(self._split_by_heads(flat), self.members, strict=True):
            copy(_of_ranks(xs[member.number], self.ranks, member.heads), part)

    def pack_tokens(self, xs: Sequence[Tensor]) -> Tensor:
        """Members (B, S, heads, channels), in their order -> a buffer that is split by tokens."""
        if self.batch == 1:  # as it lies
            return (xs[0] if len(xs) == 1 else torch.cat(list(xs), dim=2)).flatten()
        flat = xs[0].new_empty(self.taken)
        for x, place in zip(xs, self.places, strict=True):
            if self.is_even:
                part = flat.view(self.ranks, self.batch, self.own, self.heads, self.channels)
                copy(part[..., place, :], x.unflatten(1, (self.ranks, -1)).movedim(1, 0))
                continue
            parts = zip(self._split_by_tokens(flat), x.split(self.lengths, dim=1), strict=True)
            for part, tokens in parts:
                copy(part[..., place, :], tokens)
        return flat

    def unpack_tokens(self, flat: Tensor) -> list[Tensor]:
        """A buffer that is split by tokens -> members (B, S, heads, channels), maybe views."""
        shape = self.batch, -1, self.heads, self.channels
        if self.batch == 1:
            whole = flat.view(shape)
        elif self.is_even:
            parts = flat.view(self.ranks, self.batch, self.own, self.heads, self.channels)
            whole = parts.movedim(0, 1).reshape(shape)
        else:
            whole = torch.cat(self._split_by_tokens(flat), dim=1)
        return [whole.narrow(2, place.start, place.stop - place.start) for place in self.places]

    def _split_by_heads(self, flat: Tensor) -> list[Tensor]:
        whole = flat.view(self.ranks, self.batch, self.own, self.heads, self.channels)
        return [whole.narrow(3, place.start, place.stop - place.start) for place in self.places]

    def _split_by_tokens(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.by_tokens)
        return [part.view(self.batch, -1, self.heads, self.channels) for part in parts]


def parcel(tensors: Sequence[Sharded], members: Sequence[Member], rank: int) -> Parcel:
    """One parcel.

    Args:
        tensors: of the exchange.
        members: those that travel, alike but for their heads.
        rank: this one.
    """
    _, channels, batch, _, lengths = tensors[members[0].number]
    ends = accumulate((member.heads.stop - member.heads.start for member in members), initial=0)
    places = tuple(slice(*bounds) for bounds in pairwise(ends))
    numbers = batch * places[-1].stop * channels
    given, taken = numbers * lengths[rank] * len(lengths), numbers * sum(lengths)
    return Parcel(
        tuple(members),
        batch,
        channels,
        lengths,
        lengths[rank],
        (numbers * lengths[rank],) * len(lengths),
        tuple(numbers * length for length in lengths),
        places,
        given,
        taken,
        max(given, taken),
        len({*lengths}) == 1,
    )


def parcels(tensors: Sequence[Sharded], members: Sequence[Member], rank: int) -> list[Parcel]:
    """As few parcels as take all members: one for those that are alike but for their heads."""
    found: dict[object, list[Member]] = {}
    for member in members:
        found.setdefault(tensors[member.number][1:], []).append(member)
    return [parcel(tensors, together, rank) for together in found.values()]


def _of_ranks(x: Tensor, ranks: int, heads: slice) -> Tensor:
    """(B, S, P * n, channels) -> (P, B, S, heads, channels), some of the n heads of each rank."""
    batch, tokens, _, channels = x.shape
    parts = x.view(batch, tokens, ranks, -1, channels)
    return parts.narrow(3, heads.start, heads.stop - heads.start).permute(2, 0, 1, 3, 4)


def copy(to: Tensor, x: Tensor) -> None:
    """Eight bytes at a time where both lie so: PyTorch moves strided tensors element by element."""
    if not torch.compiler.is_compiling() and _in_words(to) and _in_words(x):
        to, x = to.view(torch.int64), x.view(torch.int64)
    to.copy_(x)


def _in_words(x: Tensor) -> bool:
    *strides, last = x.stride()
    bits = x.storage_offset() | x.shape[-1]
    for stride in strides:  # all are multiples of a power of two if their bits together are one
        bits |= stride
    return last == 1 and bits * x.element_size() % 8 == 0
