# SPDX-License-Identifier: Apache-2.0
"""Exact sequence parallelism: the whole sequence of some heads on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from vsa.distributed.exchange import to_heads, to_tokens
from vsa.distributed.shards import Ranks, grid_of_row, lengths_of, ranks_of, rows_by_layers
from vsa.distributed.text import around, for_every_rank, parted
from vsa.functional import attention
from vsa.stages import inputs
from vsa.values import checks
from vsa.values.budget import LayerBudget, TopK
from vsa.values.budget import resolve as resolve_budget
from vsa.values.grid import Extent, Grid
from vsa.values.precision import Precision, check_tail
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    grid: Extent | Grid,
    group: Any = None,
    lengths: Sequence[int] | None = None,
    kv_grid: Extent | Grid | None = None,
    kv_lengths: Sequence[int] | None = None,
    tile: inputs.Tile = inputs.DEFAULT_TILE,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    selection: Selection | None = None,
    score: Score = "mean",
    text: Literal["sharded", "replicated"] = "sharded",
    text_valid: Tensor | None = None,
    tail: bool = False,
    return_selection: bool = False,
    return_lse: bool = False,
    precision: Precision = "native",
    backend: str = "auto",
) -> Any:
    """``vsa.attention`` of a sequence that is sharded over ranks; every rank calls it alike.

    One all-to-all takes q, k, v and gates from shards of the sequence to shards of the heads (one
    more for each further type among them), one brings the output back; the backward does the same
    the other way round. Differentiable in q, k, v and the gates. What is the same on all ranks,
    such as a gate per head, gets its gradient in parts: add them over the group, as for weights.

    With more ranks than heads, ``group`` is a ``DeviceMesh`` of two dimensions (queries, heads):
    its rows hold whole layers of tiles along t, the ranks of a row share out heads, and keys and
    values of the ranks of a column are gathered, their gradients reduced and scattered.

    Args:
        q: (B, S_r, heads, head_dim), this rank's tokens of the sequence (prefix, video in raster
            order, suffix); shards follow each other in the order of ranks, row by row.
        k: likewise with the keys' grid; its heads divide those of q, and are repeated where the
            ranks would not divide them.
        v: like k.
        topk: as in ``vsa.attention``, for all heads.
        grid: (T, H, W) or ``vsa.Grid`` of the whole sequence.
        group: process group, or ``DeviceMesh`` of one or two dimensions; None for all ranks. The
            ranks that share out heads must divide their number.
        lengths: tokens of every rank, of the video alone where text is replicated; None splits as
            ``torch.tensor_split``, on a 2-D mesh layers of tiles over rows, then tokens inside
            each.
        kv_grid: the keys' grid where it differs.
        kv_lengths: tokens of every rank's k; None is ``lengths``, or splits ``kv_grid`` as
            ``torch.tensor_split``.
        tile: as in ``vsa.attention``.
        gate_coarse: broadcastable to this rank's q; communicated if it has a value per token.
        gate_fine: likewise.
        scale: as in ``vsa.attention``.
        selection: of this rank's heads and its row's queries, from an earlier call.
        score: as in ``vsa.attention``.
        text: "sharded" where text tokens are part of the sequence that ranks share; "replicated"
            where every rank holds all of them around its part of the video, in q, k, v, gates and
            out, as models do that carry text beside the video; not on a 2-D mesh.
        text_valid: (B, prefix + suffix) bool, the same on all ranks; not on a 2-D mesh.
        tail: as in ``vsa.attention``.
        return_selection: also return the selection of heads / P heads that this rank computed.
        return_lse: also return the log-sum-exp of this rank's tokens.
        precision: as in ``vsa.attention``, for inference.
        backend: as in ``vsa.attention``.

    Returns:
        out like q; then, as asked for, the ``Selection`` and the log-sum-exp, (B, heads, S_r).

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument, before anything
            is communicated. A rank that alone has bad input raises alone, and the others wait.
        RuntimeError: torch.distributed is not initialised, or an explicit backend cannot run here.
    """
    ranks = ranks_of(group)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _flat(name, checks.tensor(name, x))
    q, k, v = inputs.under_autocast(q, k, v)
    whole = _grid("grid", grid, tile)
    keys = whole if kv_grid is None else _grid("kv_grid", kv_grid, tile)
    replicated = _is_replicated(text, ranks)
    if lengths is None and ranks.rows > 1:
        if whole.tiles[0] < ranks.rows:
            raise ValueError(
                f"group has {ranks.rows} rows, but grid has only {whole.tiles[0]} layers of tiles "
                "along t to give them: use fewer rows or a tile that is shorter along t"
            )
        lengths = rows_by_layers(whole, ranks)
    lengths = lengths_of("lengths", lengths, whole.tokens if replicated else whole.length, ranks)
    if kv_lengths is None and kv_grid is None:
        kv_lengths = lengths
    kv_total = keys.tokens if replicated else keys.length
    kv_lengths = lengths_of("kv_lengths", kv_lengths, kv_total, ranks)
    mine = grid_of_row(whole, lengths, ranks)
    for name, x, counts, of in (
        ("q", q, lengths, whole),
        ("k", k, kv_lengths, keys),
        ("v", v, kv_lengths, keys),
    ):
        _own_length(name, x, counts[ranks.rank] + of.text * replicated, ranks)
    heads = _heads_per_rank(q.shape[2], ranks)
    first = ranks.rank % ranks.columns * heads
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
    gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
    asked = inputs.resolve(
        *(
            x[:, :1, :count].expand(-1, extent.length, -1, -1)
            for x, count, extent in ((q, heads, mine), (k, kv_heads, keys), (v, kv_heads, keys))
        ),
        grid=mine,
        kv_grid=keys,
        scale=scale,
        text_valid=text_valid,
        selection=selection,
        gates=gates,
        backend=backend,
        precision=precision,
    )
    check_tail(asked.precision, tail)
    runs_of(score)
    for name, gate in gates.items():
        checks.gate(name, gate, q)
        if gate is not None and min(lengths) == 1:
            raise ValueError(
                f"{name} needs lengths of at least 2, since a gate per token and one for all "
                "tokens look the same to a rank that has a single token"
            )
    if selection is None or topk is not None:
        resolve_budget(topk, keys.num_tiles, q.shape[2])
    if isinstance(topk, LayerBudget):
        topk = topk.of_heads(slice(first, first + heads))
    elif isinstance(topk, (tuple, list)):
        topk = tuple(topk[first : first + heads])

    k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
    sent = [q, k, v]
    shares = [ranks.of_row(n) for n in (lengths, kv_lengths, kv_lengths)]
    travelling = []
    for name, gate in gates.items():
        if gate is None:
            continue
        gate = gate[(None,) * (4 - gate.ndim)]
        if gate.shape[1] == 1:  # the same for all tokens: this rank's heads of it are here already
            gates[name] = gate if gate.shape[2] == 1 else gate[:, :, first : first + heads]
            continue
        travelling.append(name)
        sent.append(gate if gate.shape[2] > 1 else gate.expand(-1, -1, ranks.columns, -1))
        shares.append(ranks.of_row(lengths))
    held, grids = sent, [whole, keys, keys, *[whole] * len(travelling)]
    if replicated:
        sent = [parted(x, of)[1] for x, of in zip(sent, grids, strict=True)]
    sent = to_heads(sent, shares, ranks.heads)
    if replicated:
        sent = [around(*each, ranks) for each in zip(sent, held, grids, strict=True)]
    q, k, v, *moved = sent
    gates.update(zip(travelling, moved, strict=True))
    if ranks.rows > 1:  # every row gets the keys and values of all rows
        of_rows = ranks.per_row(kv_lengths)
        k, v = to_heads(
            [x.repeat(1, 1, ranks.rows, 1) for x in (k, v)], [of_rows] * 2, ranks.queries
        )

    out, chosen, lse = attention(
        q,
        k,
        v,
        topk,
        grid=mine,
        kv_grid=keys,
        scale=scale,
        selection=selection,
        score=score,
        text_valid=text_valid,
        tail=tail,
        return_selection=True,
        return_lse=True,
        precision=precision,
        backend=backend,
        gate_coarse=gates["gate_coarse"],
        gate_fine=gates["gate_fine"],
    )
    back = [out, *[lse.transpose(1, 2).unsqueeze(-1)] * return_lse]
    if replicated:
        back = [for_every_rank(x, whole, lengths) for x in back]
        lengths = [length + whole.text for length in lengths]
    out, *rest = to_tokens(back, ranks.of_row(lengths), ranks.heads)
    extras = [chosen] * return_selection + [x.squeeze(-1).transpose(1, 2) for x in rest]
    return (out, *extras) if extras else out


def _flat(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(
            f"{name} must be (B, S, heads, head_dim) with this rank's part of the sequence, but "
            f"its shape is {tuple(x.shape)}"
        )
    checks.layout(name, x)


def _grid(name: str, grid: Extent | Grid, tile: inputs.Tile) -> Grid:
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
