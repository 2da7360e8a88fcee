# SPDX-License-Identifier: Apache-2.0
"""The calls of ``vsa._C`` for a tail, from tensors or from placeholders of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vsa.backends.kernels.calls import Grids
from vsa.backends.kernels.tensors import Located, dtype_name
from vsa.backends.kernels.text import Make
from vsa.values.grid import SLOTS, Grid

if TYPE_CHECKING:
    from vsa import _C

CHUNKS_PER_BLOCK = 2
"""Of the pass over means: kConsumers in csrc/kernels/tail/backward_means.h."""
WANTED_BLOCKS = 528
"""Pieces of that pass: four for each multiprocessor of an H200, so that few wait at its end."""
MOST_SPLITS = 16
"""Each takes as much memory again as the gradients of the means."""


class TailTensors(NamedTuple):
    """What ``round_call`` makes of the means.

    Attributes:
        k: (B, kv_heads, n_k, head_dim), 16 bits, contiguous; so are the others.
        k_low: what k has lost in rounding.
        v: see k.
        bias: (n_k up to a multiple of 64,) fp32, logarithms of the tiles' sizes to base 2.
    """

    k: Located
    k_low: Located
    v: Located
    bias: Located

    def keys(self) -> _C.TailKeys:
        """As the kernels are told."""
        from vsa import _C

        return _C.TailKeys(
            k=self.k.data_ptr(),
            k_low=self.k_low.data_ptr(),
            v=self.v.data_ptr(),
            bias=self.bias.data_ptr(),
        )


def tail_tensors(
    batch: int, kv_heads: int, grid: Grid, head_dim: int, dtype: torch.dtype, make: Make
) -> TailTensors:
    """Memory for ``round_call``."""
    shape = batch, kv_heads, grid.num_tiles, head_dim
    padded = -(-grid.num_tiles // SLOTS) * SLOTS
    k, k_low, v = (make(shape, dtype) for _ in range(3))
    return TailTensors(k, k_low, v, make((padded,), torch.float32))


def round_call(k_means: Located, v_means: Located, to: TailTensors, kv_grid: Grid) -> _C.RoundMeans:
    """Means (B, kv_heads, n_k, head_dim) fp32, contiguous, as the tail's kernels read them."""
    from vsa import _C

    batch, kv_heads, _, head_dim = k_means.shape
    return _C.RoundMeans(
        k_means=k_means.data_ptr(),
        v_means=v_means.data_ptr(),
        to=to.keys(),
        kv_grid=kv_grid.as_ints(),
        batch=batch,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype_name(to.k),
    )


class TailSums(NamedTuple):
    """A call of the tail's backward, and the memory that it works in."""

    call: _C.TailBackward
    parts: Located


def splits_of(batch: int, heads: int, kv_heads: int, grids: Grids) -> int:
    """How many blocks share the query tiles of a chunk of means, the same on every machine."""
    grid, kv_grid = grids
    chunks = -(-kv_grid.num_tiles // SLOTS)
    blocks = batch * kv_heads * -(-chunks // CHUNKS_PER_BLOCK)
    query_tiles = heads // kv_heads * grid.num_tiles
    return max(1, min(query_tiles, MOST_SPLITS, -(-WANTED_BLOCKS // blocks)))


def sums_call(
    fine: _C.FineBackward,
    q: Located,
    k: Located,
    grids: Grids,
    tail: TailTensors,
    sums: Sequence[Located | None],
    accumulate: bool,
    make: Make | None = None,
) -> TailSums:
    """Both passes of the backward: over means, before the fine stage's, and over queries.

    Args:
        fine: the call of the fine stage's backward.
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        grids: theirs.
        tail: of ``round_call``.
        sums: gradients of the means of k and v, (B, kv_heads, n_k, head_dim) fp32.
        accumulate: add to what they hold.
        make: memory to work in, by default a new tensor.
    """
    from vsa import _C

    sum_k, sum_v = sums
    assert sum_k is not None and sum_v is not None
    splits = splits_of(q.shape[0], q.shape[2], k.shape[2], grids)
    shape = splits, 2, *sum_k.shape
    if make is None:
        assert isinstance(q, torch.Tensor)
        parts: Located = q.new_empty(shape, dtype=torch.float32)
    else:
        parts = make(shape, torch.float32)
    call = _C.TailBackward(
        fine=fine,
        tail=tail.keys(),
        parts=parts.data_ptr(),
        splits=splits,
        sum_k=sum_k.data_ptr(),
        sum_v=sum_v.data_ptr(),
        accumulate=accumulate,
    )
    return TailSums(call, parts)
