# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles by the means of their runs, and the coarse attention beside it, by kernels.

Means of runs are rows of fp16 in an order of their own: csrc/kernels/coarse/run_layout.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends.kernels import masked_calls
from vsa.backends.kernels.calls import check_length
from vsa.backends.kernels.coarse_calls import (
    FLOAT_BYTES,
    attention_calls,
    score_numbers,
    select_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.masked_calls import LocatedMask, clean, located
from vsa.backends.kernels.tensors import Located, address, as_matrices, beginning, dtype_name, view
from vsa.backends.tiles import smallest_tile
from vsa.backends.torch_coarse import SCORE_BYTES, row_slices
from vsa.values import bitmap
from vsa.values.grid import SLOTS, Grid
from vsa.values.problem import SubBlockScores

if TYPE_CHECKING:
    from vsa import _C

SCALES = 1e-30, 1e30
"""The kernels take scales, without their signs, in between: others lose their way in fp32."""

Empty = Callable[[Sequence[int], torch.dtype], Any]
"""Makes a contiguous tensor of a shape and type."""


class Rows(NamedTuple):
    """Means of the runs of queries or of keys.

    Attributes:
        rows: (matrices, n_q, slots, head_dim) fp16, or (matrices, blocks, 64, head_dim) of keys.
        factors: (matrices, n_q, slots) fp32, or (matrices, blocks, 64) of keys.
    """

    rows: Located
    factors: Located


class RunChoice(NamedTuple):
    """What rows of scores are made of and asked for.

    Attributes:
        queries: their runs; the query heads that share a key head follow each other in a matrix.
        keys: their runs.
        columns: n_k.
        has_empty: whether some tile has fewer runs than slots.
        scale: factor of the products.
        forced: (n_q, words) int32, tiles always kept, or None.
        counts: least tiles of a row, one number or one per head.
        mass: least share of a row's softmax.
        query_tiles: n_q.
        mask: which tiles rows may choose, None for all.
        shares: like ``counts``, budgets that are a share of these, 0 for others.
    """

    queries: Rows
    keys: Rows
    columns: int
    has_empty: bool
    scale: float
    forced: Located | None
    counts: Sequence[int]
    mass: float
    query_tiles: int
    mask: LocatedMask | None = None
    shares: Sequence[float] = ()


def slots_of(runs: int) -> int:
    """Rows that kernels keep for the runs of a tile."""
    from vsa import _C

    return min(slots for slots in _C.RUN_SLOTS if slots >= runs)


def has_empty(grids: Sequence[Grid], runs: int) -> bool:
    """Whether some tile has fewer runs than slots."""
    return slots_of(runs) > runs or any(smallest_tile(grid) < runs for grid in grids)


def can_score(asked: SubBlockScores) -> bool:
    """Whether the kernels take tensors of this type and shape, this scale and as many budgets."""
    from vsa import _C

    return (
        dtype_name(asked.q) in _C.ELEMENTS
        and asked.q.dtype == asked.k.dtype
        and asked.q.shape[-1] in _C.HEAD_DIMS
        and asked.q.stride(-1) == asked.k.stride(-1) == 1
        and is_scale(asked.scale)
        and len(asked.topk) <= _C.MOST_HEAD_BUDGETS
    )


def is_scale(scale: float) -> bool:
    """Whether the kernels take a factor of the products."""
    return SCALES[0] <= abs(scale) <= SCALES[1]


def rows_of_queries(x: Located, matrices: int, tiles: int, runs: int, empty: Empty) -> Rows:
    """Room for the runs of queries (B, S, heads, head_dim)."""
    batch, _, heads, head_dim = x.shape
    shape = matrices, batch * heads * tiles // matrices, slots_of(runs)
    return Rows(empty((*shape, head_dim), torch.float16), empty(shape, torch.float32))


def rows_of_keys(x: Located, tiles: int, runs: int, empty: Empty) -> Rows:
    """Room for the runs of keys (B, S, kv_heads, head_dim)."""
    batch, _, heads, head_dim = x.shape
    blocks = -(-tiles * slots_of(runs) // SLOTS)
    shape = batch * heads, blocks, SLOTS
    return Rows(empty((*shape, head_dim), torch.float16), empty(shape, torch.float32))


def run_means_call(
    xs: Sequence[Located],
    grids: Sequence[Grid],
    rows: Sequence[Rows],
    means: Sequence[Located],
    runs: int,
) -> _C.RunMeans:
    """Means of the runs of q and k, and of the tiles of q, k and v where there is a v.

    Args:
        xs: q, k and maybe v, (B, length, heads, head_dim).
        grids: their grids.
        rows: the runs of q and k are written here.
        means: (B, heads, num_tiles, head_dim) fp32 of each, written here; empty for none.
        runs: of a tile.
    """
    from vsa import _C

    tensors = []
    for place, (name, x, grid) in enumerate(zip("qkv", xs, grids, strict=False)):
        check_length(name, x, grid)
        own = rows[place] if place < len(rows) else None
        tensors.append(
            _C.RunTensor(
                tokens=view(x),
                grid=grid.as_ints(),
                heads=x.shape[2],
                means=address(means[place] if means else None),
                rows=address(None if own is None else own.rows),
                factors=address(None if own is None else own.factors),
                are_keys=name != "q",
            )
        )
    return _C.RunMeans(
        tensors=tensors,
        batch=xs[0].shape[0],
        head_dim=xs[0].shape[3],
        runs=runs,
        slots=slots_of(runs),
        dtype=dtype_name(xs[0]),
    )


def choice_calls(of: RunChoice, scores: Located, bitmap: Located, most_bytes: int) -> Iterator[Any]:
    """Scores and the choice by them, some rows at a time.

    Args:
        of: what is asked.
        scores: fp32 of scratch, ``score_numbers`` of them.
        bitmap: (matrices * rows, words) int32; the choice is written here.
        most_bytes: of scores that exist at a time.
    """
    from vsa import _C

    matrices, rows, slots, head_dim = of.queries.rows.shape
    for some, part in row_slices(matrices, rows, of.columns * FLOAT_BYTES, most_bytes):
        at_once, of_each = some.stop - some.start, part.stop - part.start
        first = some.start * rows + part.start
        flat = beginning(scores, at_once * of_each, of.columns)
        yield _C.SubBlockScores(
            queries=of.queries.rows[some, part].data_ptr(),
            query_factors=of.queries.factors[some, part].data_ptr(),
            keys=of.keys.rows[some].data_ptr(),
            key_factors=of.keys.factors[some].data_ptr(),
            scores=flat.data_ptr(),
            matrices=at_once,
            rows=of_each,
            columns=of.columns,
            head_dim=head_dim,
            slots=slots,
            has_empty=of.has_empty,
            scale=of.scale,
        )
        choice = select_call(
            flat, of.forced, of.counts, of.mass, of.query_tiles, first, bitmap[first:], None
        )
        yield masked_calls.select_call(choice, of.mask, of.shares)


def select(
    machine: Machine, asked: SubBlockScores, v: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Results as in ``vsa.backends.base.Backend.select_by_sub_blocks``, what can_score takes."""
    q, k, (grid, kv_grid) = asked.q, asked.k, asked.grids

    def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=q.device)

    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    tiles, columns, matrices = grid.num_tiles, kv_grid.num_tiles, batch * kv_heads
    means: list[Tensor] = []
    if v is not None:
        shapes = ((heads, tiles), (kv_heads, columns), (kv_heads, columns))
        means = [empty((batch, *shape, head_dim), torch.float32) for shape in shapes]
    queries = rows_of_queries(q, matrices, tiles, asked.runs, empty)
    keys = rows_of_keys(k, columns, asked.runs, empty)
    xs = [q, k] if v is None else [q, k, v]
    call = run_means_call(xs, (grid, kv_grid, kv_grid), (queries, keys), means, asked.runs)
    machine.run(call, q.device)

    rows = batch * heads * tiles
    words = empty((rows, bitmap.num_words(columns)), torch.int32)
    scores = empty(
        (score_numbers(matrices, rows // matrices, columns, SCORE_BYTES),), torch.float32
    )
    of = RunChoice(
        queries,
        keys,
        columns,
        has_empty(asked.grids, asked.runs),
        asked.scale,
        None if asked.must is None else bitmap.pack(asked.must),
        asked.topk,
        asked.mass,
        tiles,
        located(asked.mask, tiles),
        asked.shares,
    )
    for each in choice_calls(of, scores, words, SCORE_BYTES):
        machine.run(each, q.device)
    coarse = None
    if means:
        coarse = torch.empty_like(means[0])
        as_rows = [as_matrices(x, matrices) for x in (*clean(asked.mask, *means), coarse)]
        for each in attention_calls(
            as_rows[:3], asked.scale, scores, as_rows[3], SCORE_BYTES, of.mask
        ):
            machine.run(each, q.device)
    return words.view(batch, heads, tiles, -1), means, coarse
