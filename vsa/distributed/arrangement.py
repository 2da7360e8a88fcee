# SPDX-License-Identifier: Apache-2.0
"""What a call of ulysses_attention asks for, checked, and how its tensors travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.distributed.caches import check_kv_heads, grid_of_chunk
from vsa.distributed.exchange import Route, route
from vsa.distributed.masks import common_tile, mask_of_row
from vsa.distributed.parcels import Sharded
from vsa.distributed.shards import Ranks, even_shares, grid_of_row, lengths_of, rows_by_layers
from vsa.stages import cached, inputs
from vsa.values import checks
from vsa.values.budget import LayerBudget, TopK
from vsa.values.budget import resolve as resolve_budget
from vsa.values.grid import Extent, Grid
from vsa.values.kv_cache import KVCache
from vsa.values.masks import Mask
from vsa.values.precision import Precision, check_tail
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection

GATES = "gate_coarse", "gate_fine"
GROUPED_NUMBERS, MOST_GROUPS = 1 << 23, 4
"""Heads travel in groups of about so many numbers of q, and in so many groups at most."""


class Asked(NamedTuple):
    """Arguments of ``ulysses_attention`` besides tensors and the group; meanings as there."""

    topk: TopK | None
    grid: Extent | Grid | None
    lengths: Sequence[int] | None
    kv_grid: Extent | Grid | None
    kv_lengths: Sequence[int] | None
    tile: inputs.Tile
    scale: float | None
    score: Score
    text: str
    tail: bool
    mask: Mask | None
    return_selection: bool
    return_lse: bool
    precision: Precision
    backend: str
    head_groups: int | None
    cache: KVCache | None = None


class Tensors(NamedTuple):
    """Tensors of a call as the user gave them."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate_coarse: Tensor | None
    gate_fine: Tensor | None
    text_valid: Tensor | None
    selection: Selection | None


class HeadGroup(NamedTuple):
    """Heads that travel and are computed together.

    Attributes:
        heads: query heads among this rank's.
        of_all: the same heads among those of all ranks.
        topk: their budget.
        later: numbers of parcels that are waited for when tiles are chosen, since neither q nor k
            is in them.
    """

    heads: slice
    of_all: slice
    topk: TopK | None
    later: tuple[int, ...]


class Arrangement(NamedTuple):
    """How a call runs.

    Attributes:
        grid: of this rank's queries.
        whole: of all queries.
        keys: of all keys.
        replicated: whether every rank holds the text.
        repeats: how often each key head is repeated before it travels.
        travelling: names of gates that are exchanged.
        sent: how q, k, v and those gates travel.
        returned: how the output travels, and the log-sum-exp if it is asked for.
        heads: for each group, which of a rank's heads of each tensor are in it.
        groups: of query heads.
        lengths: tokens of the queries of every rank of this row, without replicated text.
        kv_rows: tokens of the keys of every row.
        mask: that of this rank's queries, for all heads.
    """

    grid: Grid
    whole: Grid
    keys: Grid
    replicated: bool
    repeats: int
    travelling: tuple[str, ...]
    sent: Route
    returned: Route
    heads: tuple[tuple[slice, ...], ...]
    groups: tuple[HeadGroup, ...]
    lengths: tuple[int, ...]
    kv_rows: tuple[int, ...]
    mask: Mask | None


def arrange(given: Tensors, asked: Asked, ranks: Ranks) -> tuple[Arrangement, dict[str, object]]:
    """Check a call, and lay out how it runs.

    Returns:
        How it runs, and by argument what has to be the same on all ranks.

    Raises:
        ValueError, TypeError, RuntimeError: as ``ulysses_attention``.
    """
    q, k, v, gate_coarse, gate_fine, text_valid, selection = given
    cache = asked.cache
    whole, keys = _grids(given, asked, ranks)
    replicated = _is_replicated(asked.text, ranks)
    lengths, kv_lengths = _shares(asked, ranks, whole, keys, replicated)
    mine = grid_of_row(whole, lengths, ranks)
    for name, x, counts, of in (
        ("q", q, lengths, whole),
        ("k", k, kv_lengths, keys),
        ("v", v, kv_lengths, keys),
    ):
        _own_length(name, x, counts[ranks.rank] + of.text * replicated, ranks)
    heads = _heads_per_rank(q.shape[2], ranks)
    mask = mask_of_row(asked.mask, q, (whole, keys, mine), lengths, ranks)
    if text_valid is not None and ranks.rows > 1:
        raise ValueError(
            "text_valid must be None on a 2-D group, whose rows do not all hold the text: use a "
            "group of one dimension, or leave invalid text out of the sequence"
        )
    checks.keys_match(q[:, :1], k[:, :1], v[:, :1])
    # Each rank repeats key heads until its query heads have whole ones of their own.
    repeats = ranks.columns // math.gcd(ranks.columns, k.shape[2])
    kv_heads = k.shape[2] * repeats // ranks.columns
    # Views of the shapes that attention will get: all its checks, before anything is communicated.
    gates = dict(zip(GATES, (gate_coarse, gate_fine), strict=True))
    first = ranks.rank % ranks.columns * heads
    views = (
        q[:, :1, :heads].expand(-1, mine.length, -1, -1),
        k[:, :1, :kv_heads].expand(-1, keys.length, -1, -1),
        v[:, :1, :kv_heads].expand(-1, keys.length, -1, -1),
    )
    options: dict[str, Any] = {
        "grid": mine,
        "scale": asked.scale,
        "text_valid": text_valid,
        "selection": selection,
        "backend": asked.backend,
        "precision": asked.precision,
    }
    if cache is None:
        of_one = mask[:1] if isinstance(mask, Tensor) and mask.ndim == 3 else mask
        call = inputs.resolve(*views, kv_grid=keys, gates=gates, mask=of_one, **options)
    else:
        check_kv_heads(cache, k, kv_heads, ranks)
        _check_topk(asked, selection, cache.kv_grid, q)
        own = _of_heads(asked.topk, first, first + heads)
        options |= {"kv_grid": None, "tile": inputs.DEFAULT_TILE, "mask": None}
        options |= {"score": asked.score, "tail": asked.tail}
        call = cached.check(views, own, cache, gates, **options).call
    check_tail(call.precision, asked.tail)
    runs_of(asked.score)
    for name, gate in gates.items():
        checks.gate(name, gate, q)
        if gate is not None and min(lengths) == 1:
            raise ValueError(
                f"{name} needs lengths of at least 2, since a gate per token and one for all "
                "tokens look the same to a rank that has a single token"
            )
    if cache is None:
        _check_topk(asked, selection, keys, q)

    # The same for all tokens: this rank's heads of it are here already.
    travelling = {name: x for name, x in gates.items() if x is not None and _has_tokens(x)}
    of_row, kv_of_row = ranks.of_row(lengths), ranks.of_row(kv_lengths)
    batch, head_dim, dtype = q.shape[0], q.shape[-1], q.dtype
    tensors = [
        Sharded(heads, head_dim, batch, dtype, of_row),
        *[Sharded(kv_heads, head_dim, batch, dtype, kv_of_row)] * 2,
        *(_of_gate(gate, heads, of_row) for gate in travelling.values()),
    ]
    cuts = _cuts(tensors, asked.head_groups, together=cache is not None)
    # Tiles can be chosen before there are values, unless what comes in between needs them.
    apart = (
        batch == 1
        and selection is cache is None
        and not (replicated or asked.tail or ranks.rows > 1 or torch.compiler.is_compiling())
    )
    column = ranks.rank % ranks.columns
    sent = route(tensors, column, cuts, (0, 1) if apart else ())
    back = tuple(length + whole.text * replicated for length in of_row)
    returned = [Sharded(heads, head_dim, batch, dtype, back)]
    if asked.return_lse:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        returned.append(Sharded(heads, 1, batch, wide, back))
    groups = [
        HeadGroup(
            cut[0],
            slice(first + cut[0].start, first + cut[0].stop),
            _of_heads(asked.topk, first + cut[0].start, first + cut[0].stop),
            tuple(n for n in numbers if not {0, 1} & {m.number for m in sent.parcels[n].members}),
        )
        for cut, numbers in zip(cuts, sent.groups, strict=True)
    ]
    if not apart:
        groups = [group._replace(later=()) for group in groups]
    arrangement = Arrangement(
        mine,
        whole,
        keys,
        replicated,
        repeats,
        tuple(travelling),
        sent,
        route(returned, column, [[cut[0]] * len(returned) for cut in cuts]),
        tuple(map(tuple, cuts)),
        tuple(groups),
        of_row,
        tuple(ranks.per_row(kv_lengths)),
        mask,
    )
    alike: dict[str, object] = {
        "dtype": dtype,
        **{name: _without_tokens(x) for name, x in zip("qkv", (q, k, v), strict=True)},
        **{name: x is not None and _without_tokens(x) for name, x in gates.items()},
        "topk": asked.topk,
        "grid": whole,
        "kv_grid": keys,
        "lengths": lengths,
        "kv_lengths": kv_lengths,
        "text": asked.text,
        "selection": selection is not None,
        "score": asked.score,
        "scale": call.scale,
        "tail": asked.tail,
        "mask": tuple(asked.mask.shape) if isinstance(asked.mask, Tensor) else asked.mask,
        "precision": asked.precision,
        "cache": cache is not None,
        "return_lse": asked.return_lse,
        "head_groups": len(groups),
        "requires_grad": inputs.wants_gradients(*given[:5]),
    }
    return arrangement, alike


def flat(name: str, x: Tensor) -> None:
    """A shard of a sequence.

    Raises:
        ValueError: another shape.
    """
    if x.ndim != 4:
        raise ValueError(
            f"{name} must be (B, S, heads, head_dim) with this rank's part of the sequence, but "
            f"its shape is {tuple(x.shape)}"
        )
    checks.layout(name, x)


def _grids(given: Tensors, asked: Asked, ranks: Ranks) -> tuple[Grid, Grid]:
    """Of all queries, and of all keys that are exchanged."""
    grids = asked.grid, asked.kv_grid
    if asked.cache is not None:
        more = asked.tile, asked.mask, given.selection, ranks
        chunk = grid_of_chunk(asked.cache, given.q, grids, *more)
        return chunk, chunk
    inputs.check_one_choice(asked.mask, given.selection)
    tile = common_tile(asked.mask, asked.tile, *grids)
    whole = _grid("grid", asked.grid, tile)
    return whole, whole if asked.kv_grid is None else _grid("kv_grid", asked.kv_grid, tile)


def _check_topk(asked: Asked, selection: Selection | None, keys: Grid, q: Tensor) -> None:
    """A budget for all heads, unless a selection stands in its place."""
    if selection is None or asked.topk is not None:
        resolve_budget(asked.topk, keys.num_tiles, q.shape[2])


def _shares(
    asked: Asked, ranks: Ranks, whole: Grid, keys: Grid, replicated: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of every rank, of queries and of keys; of the video alone where text is replicated."""
    lengths, kv_lengths = asked.lengths, asked.kv_lengths
    if lengths is None and ranks.rows > 1:
        if whole.tiles[0] < ranks.rows:
            raise ValueError(
                f"group has {ranks.rows} rows, but grid has only {whole.tiles[0]} layers of tiles "
                "along t to give them: use fewer rows or a tile that is shorter along t"
            )
        lengths = rows_by_layers(whole, ranks)
    lengths = lengths_of("lengths", lengths, whole.tokens if replicated else whole.length, ranks)
    if kv_lengths is None and asked.kv_grid is None:
        kv_lengths = lengths
    kv_total = keys.tokens if replicated else keys.length
    kv_lengths = lengths_of("kv_lengths", kv_lengths, kv_total, ranks)
    return tuple(lengths), tuple(kv_lengths)


def _cuts(tensors: Sequence[Sharded], head_groups: int | None, together: bool) -> list[list[slice]]:
    """For each group of heads, which of a rank's heads of every tensor are in it."""
    q, k = tensors[:2]
    most = 1 if together else k.heads  # a cache is written with all heads at once
    if any(gate.heads < q.heads for gate in tensors[3:]):
        most = 1  # one gate for all heads: its gradient is the sum over all of them
    if head_groups is None:
        numbers = q.batch * sum(q.lengths) * q.heads * q.channels
        head_groups = min(MOST_GROUPS, max(1, numbers // GROUPED_NUMBERS))
    else:
        checks.integer("head_groups", head_groups, at_least=1)
    shares = even_shares(k.heads, min(head_groups, most))
    bounds = pairwise(accumulate(shares, initial=0))
    return [
        [slice(a * x.heads // k.heads, b * x.heads // k.heads) for x in tensors] for a, b in bounds
    ]


def _has_tokens(gate: Tensor) -> bool:
    """Whether a gate has a value per token."""
    return gate.ndim > 2 and gate.shape[-3] > 1


def _of_gate(gate: Tensor, heads: int, lengths: tuple[int, ...]) -> Sharded:
    batch, _, of_gate, channels = (1,) * (4 - gate.ndim) + tuple(gate.shape)
    return Sharded(heads if of_gate > 1 else 1, channels, batch, gate.dtype, lengths)


def _of_heads(topk: TopK | None, start: int, stop: int) -> TopK | None:
    if isinstance(topk, LayerBudget):
        return topk.of_heads(slice(start, stop))
    return tuple(topk[start:stop]) if isinstance(topk, (tuple, list)) else topk


def _without_tokens(x: Tensor) -> tuple[int, ...]:
    """Batch elements, heads and channels."""
    return tuple(size for axis, size in enumerate(x.shape) if axis != x.ndim - 3)


def _grid(name: str, grid: Extent | Grid | None, tile: inputs.Tile) -> Grid:
    if not isinstance(grid, Grid):
        return Grid(checks.extent(name, grid), tile=tile)
    if tile not in (inputs.DEFAULT_TILE, "auto", grid.tile):
        raise ValueError(
            f"tile is {tile!r}, but {name} is a vsa.Grid whose tile is {grid.tile}: give only one "
            "of them"
        )
    return grid


def _is_replicated(text: str, ranks: Ranks) -> bool:
    if text not in ("sharded", "replicated"):
        raise ValueError(f'text must be "sharded" or "replicated", but it is {text!r}')
    if text == "replicated" and ranks.rows > 1:
        raise ValueError(
            'text must be "sharded" on a 2-D group, whose rows hold different queries, but it is '
            '"replicated": use a group of one dimension'
        )
    return text == "replicated"


def _own_length(name: str, x: Tensor, wanted: int, ranks: Ranks) -> None:
    if x.shape[1] != wanted:
        raise ValueError(
            f"{name} has {x.shape[1]} tokens on rank {ranks.rank} of the group, but its part of "
            f"the sequence is {wanted}: pass lengths= where shards are not the default"
        )


def _heads_per_rank(heads: int, ranks: Ranks) -> int:
    if heads % ranks.columns:
        sizes = [n for n in range(1, heads + 1) if heads % n == 0]
        fewer = max(n for n in sizes if n < ranks.columns)
        more = [str(n) for n in sizes if n > ranks.columns][:1]
        raise ValueError(
            f"q has {heads} heads, which {ranks.columns} ranks of group cannot share out evenly: "
            f"use {' or '.join([str(fewer), *more])} ranks, or a 2-D DeviceMesh (queries, heads) "
            f"whose second dimension is {fewer}"
        )
    return heads // ranks.columns
