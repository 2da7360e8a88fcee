# SPDX-License-Identifier: Apache-2.0
"""The stages of prepared calls that a cache of chunks changes: what is read, written and chosen.

Tile means lie by slots, and so do scores. Only between equal scores the choice asks for the order
of time, so it comes out by slots, as the fine stage reads keys. A choice that a user has or gets is
in the order of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vsa.backends.kernels.coarse_calls import (
    Choice,
    TimeOrder,
    attention_calls,
    choice_calls,
    score_numbers,
)
from vsa.backends.kernels.placeholder import Placeholder, Workspace, contiguous_strides
from vsa.backends.kernels.tensors import as_matrices, beginning, dtype_name, view
from vsa.backends.torch_coarse import SCORE_BYTES
from vsa.values.bitmap import num_words
from vsa.values.task import Task

if TYPE_CHECKING:
    from vsa import _C

NOWHERE = (0, 0, 0, 0)


class Held:
    """The memory of a cache, for the calls of one kind.

    Args:
        task: of the current chunk, with a ring.
        slots: of a program, for the cache's tokens, means and numbers.

    Attributes:
        keys: (B, S_k, kv_heads, head_dim), text and chunks in the order of slots.
        values: like keys.
        means: of keys and values, (B, kv_heads, n_k, head_dim) fp32; contiguous if the ring is
            full.
    """

    def __init__(self, task: Task, slots: Sequence[int]) -> None:
        assert task.ring is not None
        self._task, self._ring = task, task.ring
        batch, _, kv_heads, head_dim = task.k.shape
        length = self._ring.prefix + self._ring.capacity * task.grid.tokens
        tiles = self._ring.capacity * task.grid.num_tiles
        held, of_held = task.kv_grid.length, task.kv_grid.num_tiles
        of_tokens, of_means, self._numbers = slots
        self.keys, self.values = (
            _side(of_tokens, side, (batch, length, kv_heads, head_dim), task.k.dtype)[:, :held]
            for side in range(2)
        )
        self.means = tuple(
            _side(of_means, side, (batch, kv_heads, tiles, head_dim), torch.float32)[:, :, :of_held]
            for side in range(2)
        )

    def matrices(self) -> list[Placeholder]:
        """The means as (B * kv_heads, n_k, head_dim)."""
        found = []
        for mean in self.means:
            batch, kv_heads, tiles, head_dim = mean.shape
            shape = batch * kv_heads, tiles, head_dim
            found.append(Placeholder(mean.slot, shape, mean.strides[1:], mean.dtype, mean.offset))
        return found

    @property
    def order(self) -> TimeOrder | None:
        """Of columns that are tiles in the order of slots, None where that is the order of time."""
        if not self._ring.turns:
            return None
        tiles = self._task.grid.num_tiles
        return TimeOrder(self._number(1 + self._ring.sinks), self._ring.sinks * tiles, tiles)

    def by_slots(self, source: Placeholder, target: Placeholder) -> _C.ReorderBitmap:
        """A choice in the order of time, by slots."""
        return self._reorder(source, target, 1 + self._ring.capacity)

    def by_time(self, source: Placeholder, target: Placeholder) -> _C.ReorderBitmap:
        """The inverse."""
        return self._reorder(source, target, 1)

    def _reorder(self, source: Placeholder, target: Placeholder, first: int) -> _C.ReorderBitmap:
        from vsa import _C

        batch, heads, rows, _ = source.shape
        return _C.ReorderBitmap(
            source=source.data_ptr(),
            target=target.data_ptr(),
            order=self._number(first),
            rows=batch * heads * rows,
            columns=self._task.kv_grid.num_tiles,
            per_chunk=self._task.grid.num_tiles,
        )

    def _number(self, index: int) -> int:
        """Address of one of the ring's numbers, see ``vsa.values.kv_cache``."""
        return Placeholder(self._numbers, (1,), (1,), torch.int64, 8 * index).data_ptr()

    def means_call(
        self, tokens: Sequence[Placeholder], q_means: Placeholder | None
    ) -> _C.ChunkMeans:
        """The current chunk's means, and its keys and values, in their slot.

        Args:
            tokens: q, k and v, (B, S, heads, head_dim).
            q_means: (B, heads, n_q, head_dim) fp32, or None where nobody wants them.
        """
        from vsa import _C

        task, grid = self._task, self._task.grid
        q, k, v = tokens
        # A slot that is not the device's to know is where addresses begin.
        past = 0 if self._ring.is_full else self._ring.past
        first = self._ring.prefix + past * grid.tokens
        parts = [each[:, first:] for each in (self.keys, self.values)]
        k_means, v_means = (each[:, :, past * grid.num_tiles :] for each in self.means)

        def tensor(x: Placeholder, means: Placeholder) -> _C.MeanTensor:
            return _C.MeanTensor(
                tokens=view(x),
                grid=grid.as_ints(),
                sizes=0,
                heads=x.shape[2],
                means=means.data_ptr(),
            )

        texts = [view(each) if grid.prefix else NOWHERE for each in (self.keys, self.values)]
        return _C.ChunkMeans(
            k=tensor(k, k_means),
            v=tensor(v, v_means),
            queries=[] if q_means is None else [tensor(q, q_means)],
            k_slots=view(parts[0]),
            v_slots=view(parts[1]),
            k_text=texts[0],
            v_text=texts[1],
            slot=self._number(0) if self._ring.is_full else 0,
            slots=self._ring.capacity,
            batch=task.q.shape[0],
            head_dim=task.q.shape[3],
            dtype=dtype_name(k),
        )


def _side(slot: int, side: int, shape: tuple[int, ...], dtype: torch.dtype) -> Placeholder:
    """What a cache has of keys (0) or values (1)."""
    strides = contiguous_strides((2, *shape))
    return Placeholder(slot, shape, strides[1:], dtype, side * strides[0] * dtype.itemsize)


class CachedCoarse:
    """``prepared_coarse.CoarseForward`` over a cache: the chunk is written in any case.

    Attributes:
        means: of q where somebody wants them, of keys and of values.
        out: (B, heads, n_q, head_dim) fp32, the coarse output, or None without a coarse gate.
    """

    def __init__(self, task: Task, out: Placeholder | None, work: Workspace, held: Held) -> None:
        self._task, self.out, self._held = task, out, held
        batch, _, heads, head_dim = task.q.shape
        kv_heads, tiles = task.k.shape[2], task.grid.num_tiles
        self._matrices, self._rows = batch * kv_heads, heads // kv_heads * tiles
        self._scores: Placeholder | None = None
        q_means: Placeholder | None = None
        if task.bitmap is None or out is not None:
            q_means = work.part((batch, heads, tiles, head_dim), torch.float32)
            columns = task.kv_grid.num_tiles
            numbers = score_numbers(self._matrices, self._rows, columns, SCORE_BYTES)
            self._scores = work.part((numbers,), torch.float32)
        self._q_means = q_means
        self.means = [*([] if q_means is None else [q_means]), *held.means]

    def calls(self, tokens: Sequence[Placeholder], bitmap: Placeholder) -> Iterator[Any]:
        """From q, k and v; a choice that is not given is written to ``bitmap``, by slots."""
        q_means = self._q_means
        yield self._held.means_call(tokens, q_means)
        if q_means is None or self._scores is None:
            return
        task, matrices = self._task, self._matrices
        of_q, (of_k, of_v) = as_matrices(q_means, matrices), self._held.matrices()
        out = None if self.out is None else as_matrices(self.out, matrices)
        if task.bitmap is not None:
            assert out is not None
            means = of_q, of_k, of_v
            yield from attention_calls(means, task.scale, self._scores, out, SCORE_BYTES)
            return
        asked = Choice(
            q=of_q,
            k=of_k,
            v=None if out is None else of_v,
            scale=task.scale,
            forced=None,
            counts=task.counts,
            mass=task.mass,
            query_tiles=task.grid.num_tiles,
            order=self._held.order,
        )
        words = beginning(bitmap, matrices * self._rows, num_words(task.kv_grid.num_tiles))
        yield from choice_calls(asked, self._scores, words, out, SCORE_BYTES)

    def in_two(self, tokens: Sequence[Placeholder], bitmap: Placeholder) -> None:
        """Never: the chunk's values go into the cache with its keys."""
