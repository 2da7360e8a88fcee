# SPDX-License-Identifier: Apache-2.0
"""The specification over a sequence of segments: naive loops in fp64, as ``vsa.verify.reference``.

Nothing is shared with what it is held against: a segment is told here in plain words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.verify.reference import best, combine, softmax_attention, tiles_of


class Part(NamedTuple):
    """A segment.

    Attributes:
        shape: (T, H, W); (1, 1, tokens) for a flat one.
        tile: tokens of a tile along each axis.
        is_flat: whether ``valid`` speaks of its tokens.
        kept: whether all sparse queries attend it as a whole; else its tiles compete.
        dense: whether its queries attend everything; else what is kept and what their tile chose.
        coarse: whether its tiles are in the coarse stage.
        topk: its tiles that a query tile chooses, a number or share, or one of these per head; None
            for those that compete for the call's with all others of the kind.
        mass: share of the softmax over its tiles that the chosen ones must hold as well.
    """

    shape: Sequence[int]
    tile: Sequence[int]
    is_flat: bool = False
    kept: bool = False
    dense: bool = False
    coarse: bool = True
    topk: float | Sequence[float] | None = None
    mass: float = 0.0


class Tile(NamedTuple):
    """A tile: the place of its segment, and the positions of its real tokens."""

    part: int
    tokens: list[int]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    topk: float | Sequence[float] | None,
    *,
    mass: float = 0.0,
    kv_parts: Sequence[Part] | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    given: Tensor | None = None,
    must: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Video Sparse Attention over a sequence of segments.

    Args:
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        parts: the segments of q, and of k where ``kv_parts`` is None.
        topk: for tiles of segments without a number of their own.
        mass: the same.
        kv_parts: the segments of k.
        gate_coarse: broadcastable to q, or None to leave the coarse output out.
        gate_fine: broadcastable to q, or None for 1.
        scale: factor of the scores, by default head_dim ** -0.5.
        valid: (B, tokens of all flat ones) bool.
        given: (B, heads, sparse query tiles, competing key tiles) bool, a choice that is made.
        must: (sparse query tiles, competing key tiles) bool, tiles that come first in their
            competition, count in it, and are all kept.

    Returns:
        out (B, S_q, heads, head_dim), the choice like ``given``, lse (B, heads, S_q); fp64.
    """
    q, k, v = q.double(), k.double(), v.double()
    kv_parts = parts if kv_parts is None else kv_parts
    batches, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    nothing, minus_infinity = q.new_zeros(head_dim), q.new_tensor(-math.inf)
    out_rows, lse_rows, choices = {}, {}, []
    for b in range(batches):
        query_tiles = tiles_of_parts(parts, None if valid is None else valid[b].tolist())
        key_tiles = tiles_of_parts(kv_parts, None if valid is None else valid[b].tolist())
        columns = [j for j, tile in enumerate(key_tiles) if not kv_parts[tile.part].kept]
        rows = [i for i, tile in enumerate(query_tiles) if not parts[tile.part].dense]
        for h in range(heads):
            head = h // (heads // k.shape[2])
            queries, keys, values = q[b, :, h], k[b, :, head], v[b, :, head]
            chosen = torch.zeros(len(rows), len(columns), dtype=torch.bool)
            for i, tile in enumerate(query_tiles):
                part = parts[tile.part]
                if not tile.tokens:
                    continue
                mean = queries[tile.tokens].mean(0)
                # coarse
                others = [t for t in key_tiles if kv_parts[t.part].coarse and t.tokens]
                coarse = None
                if part.coarse and others:
                    scores = torch.stack([scale * mean @ keys[t.tokens].mean(0) for t in others])
                    means = torch.stack([values[t.tokens].mean(0) for t in others])
                    coarse = scores.softmax(0) @ means
                # select
                picked = list(range(len(key_tiles)))
                if not part.dense:
                    row = rows.index(i)
                    forced = [] if must is None else must[row].nonzero().flatten().tolist()
                    taken = (
                        choose(
                            mean,
                            keys,
                            key_tiles,
                            kv_parts,
                            of_head(topk, h),
                            mass,
                            scale,
                            h,
                            [columns[each] for each in forced],
                        )
                        if given is None
                        else [columns[j] for j in given[b, h, row].nonzero().flatten().tolist()]
                    )
                    for j in taken:
                        chosen[row, columns.index(j)] = True
                    kept = [j for j, t in enumerate(key_tiles) if kv_parts[t.part].kept]
                    picked = sorted({*taken, *kept})
                # fine
                attended = [token for j in picked for token in key_tiles[j].tokens]
                for token in tile.tokens:
                    fine, lse_rows[b, h, token] = softmax_attention(
                        queries[token],
                        keys[attended],
                        values[attended],
                        [1] * len(attended),
                        scale,
                    )
                    out_rows[b, h, token] = combine(
                        fine, coarse, gate_fine, gate_coarse, q.shape, b, token, h
                    )
            choices.append(chosen)
    out = [
        out_rows.get((b, h, token), nothing)
        for b in range(batches)
        for token in range(length)
        for h in range(heads)
    ]
    lse = [
        lse_rows.get((b, h, token), minus_infinity)
        for b in range(batches)
        for h in range(heads)
        for token in range(length)
    ]
    return (
        torch.stack(out).view(q.shape),
        torch.stack(choices).unflatten(0, (batches, heads)),
        torch.stack(lse).view(batches, heads, length),
    )


def choose(
    mean: Tensor,
    keys: Tensor,
    tiles: Sequence[Tile],
    parts: Sequence[Part],
    topk: float | None,
    mass: float,
    scale: float,
    head: int,
    forced: Sequence[int],
) -> list[int]:
    """The tiles that one query tile chooses: competition by competition.

    A share is of all tiles of a competition, those without a real token included.
    """
    competing = [place for place, part in enumerate(parts) if not part.kept]
    shared = [place for place in competing if parts[place].topk is None]
    pools = [([place], parts[place]) for place in competing if place not in shared]
    rules = [(of, of_head(part.topk, head), part.mass) for of, part in pools]
    found = []
    for of, number, least in [*rules, *([(shared, topk, mass)] if shared else [])]:
        all_tiles = [j for j, tile in enumerate(tiles) if tile.part in of]
        there = [j for j in all_tiles if tiles[j].tokens]
        assert number is not None
        count = number if isinstance(number, int) else max(1, math.ceil(number * len(all_tiles)))
        scores = [(scale * mean @ keys[tiles[j].tokens].mean(0)).item() for j in there]
        first = [place for place, j in enumerate(there) if j in forced]
        if first:
            assert not least
            free = [place for place in range(len(there)) if place not in first]
            rest = max(0, min(count - len(first), len(free)))
            more = best([scores[place] for place in free], rest) if rest else []
            found += [there[place] for place in [*first, *(free[at] for at in more)]]
        elif there:
            found += [there[place] for place in best(scores, count, least)]
    return found


def of_head(topk: float | Sequence[float] | None, head: int) -> float | None:
    """A budget of one head."""
    return topk[head] if isinstance(topk, Sequence) else topk


def tiles_of_parts(parts: Sequence[Part], valid: Sequence[bool] | None) -> list[Tile]:
    """All tiles in their order, with the positions of the tokens in them that are real."""
    found, first, text = [], 0, 0
    for place, part in enumerate(parts):
        tokens = math.prod(part.shape)
        real = set(range(first, first + tokens))
        if valid is not None and part.is_flat:
            real = {token for token in real if valid[text + token - first]}
            text += tokens
        for tile in tiles_of(part.shape, part.tile, first):
            found.append(Tile(place, [token for token in tile if token in real]))
        first += tokens
    return found
