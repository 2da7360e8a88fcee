# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a sequence go in padded tiles, and which of its tiles are there at all."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from vsa.stages.watchers import is_watched
from vsa.values import padded
from vsa.values.grid import SLOTS
from vsa.values.remembered import Remembered
from vsa.values.sequence import Segment, Sequence

T = TypeVar("T")


class Slots(NamedTuple):
    """Segments as padded tiles of 64 slots, in an order of their own.

    Tiles of more tokens are several of these, their parts, one after the other.

    Attributes:
        sizes: (parts,) int32, real tokens of each part, which come first in it.
        of_tokens: (S,) int64, the slot of each token; invalid ones get slots of padding.
        tile_of_part: (parts,) int64, tiles counted in this order.
    """

    sizes: Tensor
    of_tokens: Tensor
    tile_of_part: Tensor

    @property
    def total(self) -> int:
        """Slots in all."""
        return len(self.sizes) * SLOTS


Order = tuple[int, ...]
"""Places of all segments."""
_slots: Remembered[Slots] = Remembered(32)
_tiles: Remembered[Tensor] = Remembered(32)


def slots_of(
    sequence: Sequence, order: Order, device: torch.device, valid: Tensor | None = None
) -> Slots:
    """Made on the device from whole numbers alone, so that nothing waits for it; once, if all real.

    Args:
        sequence: what is laid out.
        order: of its segments' tiles.
        device: of the tensors.
        valid: (text,) bool, which tokens of the flat segments are real, or None for all.
    """
    if valid is None:
        return _once(lambda: _slots_of(sequence, order, device), _slots, (sequence, order), device)
    return _slots_of(sequence, order, device, valid)


def _slots_of(
    sequence: Sequence, order: Order, device: torch.device, valid: Tensor | None = None
) -> Slots:
    sizes, tiles = [], []
    slots: dict[int, Tensor] = {}
    first_tile = first_part = 0
    for at in order:
        segment = sequence.segments[at]
        token = segment.boxes.tokens_of_tiles(device)
        there = real = token >= 0
        if valid is not None and not segment.is_video:
            real = functional.pad(valid[_text_of(sequence, at)], (0, 1))[token]
        counts = real.sum(1, keepdim=True)
        others = counts + (there & ~real).cumsum(1)
        place = torch.where(real, real.cumsum(1), others) - 1
        tile = torch.arange(segment.num_tiles, device=device)
        slot = (first_part + tile[:, None] * segment.parts) * SLOTS + place
        slots[at] = slot.new_empty(segment.tokens + 1).index_put_((token,), slot)[:-1]
        sizes.append(padded.sizes_of_parts(counts[:, 0], segment.parts))
        tiles.append(first_tile + torch.arange(len(sizes[-1]), device=device) // segment.parts)
        first_tile, first_part = first_tile + segment.num_tiles, first_part + len(sizes[-1])
    of_tokens = torch.cat([slots[at] for at in sorted(slots)])
    return Slots(torch.cat(sizes).to(torch.int32), of_tokens, torch.cat(tiles))


def _text_of(sequence: Sequence, place: int) -> slice:
    """Where a flat segment's tokens stand among those of all flat ones."""
    counts = [each.tokens * (not each.is_video) for each in sequence.segments]
    return slice(sum(counts[:place]), sum(counts[: place + 1]))


def tile_of_token(sequence: Sequence, device: torch.device) -> Tensor:
    """The tile, counted over all segments, that each token lies in, (S,) int64; made once."""
    return _once(lambda: _tile_of_token(sequence, device), _tiles, sequence, device)


def _tile_of_token(sequence: Sequence, device: torch.device) -> Tensor:
    found, first = [], 0
    for segment in sequence.segments:
        found.append(first + segment.boxes.tile_of_token(device))
        first += segment.num_tiles
    return torch.cat(found)


def _once(make: Callable[[], T], kept: Remembered[T], of: Hashable, device: torch.device) -> T:
    """What was made of equal segments before, on the same stream, which orders it.

    Not where operators are watched, nor in the capture of a graph, which needs memory of its own.
    """
    if torch.compiler.is_compiling() or is_watched():
        return make()
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device).cuda_stream
    key = of, device, stream
    found = kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # autograd may have to keep it
            found = make()
        kept.put(key, found)
    return found


def real_tokens(sequence: Sequence, text_valid: Tensor) -> Tensor:
    """Which tokens are real, (B, S) bool."""
    found = []
    for place, segment in enumerate(sequence.segments):
        real = text_valid[:, _text_of(sequence, place)]
        if segment.is_video:
            real = text_valid.new_ones(len(text_valid), segment.tokens)
        found.append(real)
    return torch.cat(found, dim=1)


def of_segments(sequence: Sequence, marked: list[bool], device: torch.device) -> Tensor:
    """Which tokens lie in the segments that are marked, (S,) bool."""
    each = zip(sequence.segments, marked, strict=True)
    return torch.cat([torch.full((segment.tokens,), mark, device=device) for segment, mark in each])


def tokens_in_tiles(segment: Segment, valid: Tensor) -> Tensor:
    """Real tokens of each tile of a flat segment, of which ``valid`` (B, tokens) bool are real.

    Returns:
        (B, num_tiles) int64.
    """
    token = segment.boxes.tokens_of_tiles(valid.device)
    return functional.pad(valid, (0, 1))[:, token].sum(-1)
