# SPDX-License-Identifier: Apache-2.0
"""Padded tiles in prepared calls: their sizes, what rows keep, and in which order they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vsa.backends.kernels.calls import AS_THEY_COME, Order, groups_of, sort_call
from vsa.backends.kernels.placeholder import Placeholder, Workspace, contiguous_strides
from vsa.backends.kernels.tensors import address
from vsa.values.task import Task

if TYPE_CHECKING:
    from vsa import _C

Find = Callable[[str], int]
"""The number of the slot of this name; a forward and a backward have slots of their own."""


class Kept(NamedTuple):
    """What the forward writes of padded tiles, in memory that the backward has, too.

    Attributes:
        lengths: (B, heads, 64-slot query tiles) int32, bits of each row; None where all rows are
            as long as each other.
        part_sizes: (64-slot key tiles,) int32, None where the caller's sizes are those.
    """

    lengths: Placeholder | None
    part_sizes: Placeholder | None


def kept_of(task: Task, kept: Workspace) -> Kept:
    """Parts of a workspace, for calls over padded tiles."""
    padded = task.padded
    if padded is None:
        return Kept(None, None)
    batch, _, heads, _ = task.q.shape
    lengths = part_sizes = None
    if padded.given is not None:
        lengths = kept.part((batch, heads, task.grid.num_tiles), torch.int32)
    if padded.parts > 1:
        part_sizes = kept.part((task.kv_grid.num_tiles,), torch.int32)
    return Kept(lengths, part_sizes)


class PaddedCalls:
    """What a program of padded tiles has besides.

    Attributes:
        sizes: of the queries' and of the keys' tiles of 64 slots, as kernels read them; twice None
            without padded tiles.
    """

    def __init__(self, task: Task, kept: Kept, slot: Find) -> None:
        self._task, self._kept, self._slot = task, kept, slot
        self.sizes: tuple[Placeholder | None, Placeholder | None] = (None, None)
        padded = task.padded
        if padded is not None:
            self._kv_sizes = self._given("KV_SIZES", padded.kv_sizes.shape, torch.int32)
            sizes = None
            if padded.sizes is not None:
                sizes = self._given("SIZES", padded.sizes.shape, torch.int32)
            self._sizes = sizes
            self.sizes = sizes, kept.part_sizes or self._kv_sizes

    def _given(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Placeholder:
        shape = tuple(shape)
        return Placeholder(self._slot(name), shape, contiguous_strides(shape), dtype)

    def choice(self, bitmap: Placeholder) -> Iterator[_C.KeptTiles]:
        """From lists or a map to a bitmap; of one that was chosen, what holds no token goes."""
        from vsa import _C

        task, padded = self._task, self._task.padded
        if padded is None:
            return
        batch, _, heads, _ = task.q.shape
        query_tiles = task.grid.num_tiles // padded.parts
        listed = counts = None
        if padded.given is not None:
            listed = self._given("LISTED", padded.given.shape, padded.given.dtype)
        if padded.counts is not None:
            counts = self._given("COUNTS", padded.counts.shape, torch.int32)
        yield _C.KeptTiles(
            lists=0 if padded.lists is None else address(listed),
            map=0 if padded.block_map is None else address(listed),
            words=bitmap.data_ptr() if listed is None else 0,
            counts=address(counts),
            sizes=address(self._sizes),
            kv_sizes=self._kv_sizes.data_ptr(),
            bitmap=bitmap.data_ptr(),
            lengths=address(self._kept.lengths),
            part_sizes=address(self._kept.part_sizes),
            rows=batch * heads * query_tiles,
            query_tiles=query_tiles,
            columns=padded.kv_sizes.shape[0],
            width=0 if padded.lists is None else padded.lists.shape[3],
            parts=padded.parts,
        )

    def order(
        self, axes: Placeholder, together: int, work: Workspace, cleared: Placeholder
    ) -> Sorted:
        """Query tiles by the length of their rows, where callers say what rows keep.

        Args:
            axes: (B, heads) int32 of ``axis_call``.
            together: tiles that a block works on.
            work: memory.
            cleared: (1,) int32, zero by then.
        """
        lengths = self._kept.lengths
        if lengths is None:
            return Sorted(AS_THEY_COME, [])
        grid = self._task.grid
        groups = groups_of(grid.num_tiles, together)
        order = Order(work.part((*axes.shape, groups), torch.int32), cleared)
        return Sorted(order, [sort_call(lengths, axes, order, 0, grid.tiles[0], together)])


class Sorted(NamedTuple):
    """An order of work, and the calls that find it."""

    order: Order
    calls: Sequence[_C.GroupSort]
