# SPDX-License-Identifier: Apache-2.0
"""The fine stage over a sequence, its coarse branch, and both together.

Where one video chooses and everything else is always attended, the fine stage is that of a grid
with text, on the tokens where they lie. Elsewhere tokens are copied once into padded tiles of 64
slots, attention runs over these, and its rows are copied back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import accumulation_dtype
from vsa.stages.coarse import coarse_attention
from vsa.stages.fine import fine, fine_of_padded
from vsa.stages.sequences.call import Mixed
from vsa.stages.sequences.choice import Pool, choose
from vsa.stages.sequences.layout import (
    Order,
    Slots,
    of_segments,
    real_tokens,
    slots_of,
    tile_of_token,
)
from vsa.stages.sequences.means import TileMeans, without_empty
from vsa.values import bitmap
from vsa.values.problem import PaddedProblem
from vsa.values.selection import Selection


class Branch(NamedTuple):
    """What a call computes besides its fine stage.

    Attributes:
        selection: the choice.
        queries: means of q, or None where nothing needs them.
        keys: means of k and v.
    """

    selection: Selection
    queries: TileMeans | None
    keys: TileMeans | None


def prepare(
    mixed: Mixed,
    pools: list[Pool] | None,
    selection: Selection | None,
    with_coarse: bool,
    must: Tensor | None = None,
) -> Branch:
    """The choice, and tile means as far as they are needed.

    Args:
        mixed: checked inputs.
        pools: who competes, where the choice is to be made.
        selection: a choice that is given.
        with_coarse: whether there is a coarse branch.
        must: as in ``choose``.
    """
    q, k, v = mixed.call.q, mixed.call.k, mixed.call.v
    if not with_coarse:  # gradients come from the fine stage alone
        q, k, v = q.detach(), k.detach(), v.detach()
    queries = keys = None
    if pools is not None or with_coarse:
        of_queries, of_keys = mixed.sequence.segments, mixed.kv_sequence.segments
        rest = mixed.text_valid, mixed.call.backend
        wanted = [each.coarse if with_coarse else each.is_sparse for each in of_queries]
        queries = TileMeans([q], mixed.sequence, list(map(bool, wanted)), *rest)
        wanted = [each.coarse if with_coarse else each.competes for each in of_keys]
        both = [k, v] if with_coarse else [k]
        keys = TileMeans(both, mixed.kv_sequence, list(map(bool, wanted)), *rest)
    if selection is None:
        assert pools is not None and queries is not None and keys is not None
        selection = choose(mixed, queries, keys, pools, must)
    return Branch(selection, queries, keys)


def attend(
    mixed: Mixed, branch: Branch, gate_coarse: Tensor | None, gate_fine: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All stages but the choice: out like q, and lse (B, heads, S)."""
    out, lse = fine_stage(mixed, branch.selection)
    if gate_coarse is None and gate_fine is None:
        return out, lse
    device = out.device
    whole = out.to(accumulation_dtype(out))
    # Zero times a gate is not zero where the gate of what is no token is NaN.
    real = None
    if mixed.text_valid is not None:
        real = real_tokens(mixed.sequence, mixed.text_valid)[..., None, None]
    if gate_fine is not None:
        whole = whole * _masked(gate_fine.to(whole.dtype), real)
    if gate_coarse is not None:
        rows = coarse_rows(mixed, branch)
        tile = tile_of_token(mixed.sequence, device)
        gate = _masked(gate_coarse.to(whole.dtype), real)
        marked = [bool(each.coarse) for each in mixed.sequence.segments]
        if not all(marked):
            gate = _masked(gate, of_segments(mixed.sequence, marked, device)[:, None, None])
        whole = whole + rows.transpose(1, 2).index_select(1, tile) * gate
    return whole.to(out.dtype), lse


def fine_stage(mixed: Mixed, selection: Selection) -> tuple[Tensor, Tensor]:
    """Results (B, S, heads, head_dim) and lse (B, heads, S): zeros and -inf at invalid tokens."""
    if mixed.in_raster:
        return fine(mixed.call, selection)
    q, k, v, words = mixed.call.q, mixed.call.k, mixed.call.v, selection.bitmap
    if mixed.text_valid is None:
        return _in_tiles(mixed, q, k, v, words, None)
    # Padded tiles have the same sizes in the whole batch, so each element goes by itself.
    found = []
    for b in range(len(q)):
        one = slice(b, b + 1)
        found.append(_in_tiles(mixed, q[one], k[one], v[one], words[one], mixed.text_valid[b]))
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def sparse_lse(mixed: Mixed, selection: Selection) -> Tensor:
    """Log-sum-exp of all queries that choose, (B, heads, their tokens)."""
    _, lse = fine_stage(mixed, selection)
    marked = [each.is_sparse for each in mixed.sequence.segments]
    parts = [lse[..., mixed.sequence.tokens_of(at)] for at, mark in enumerate(marked) if mark]
    return torch.cat(parts, dim=-1)


def _masked(gate: Tensor, there: Tensor | None) -> Tensor:
    """A gate that is zero but there."""
    return gate if there is None else torch.where(there, gate, 0)


def _in_tiles(
    mixed: Mixed, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fine stage over padded tiles, to and fro; ``valid`` (text,) bool for one element.

    Tiles that choose, and those that are chosen from, come first: then the choice is the beginning
    of all rows and columns.
    """
    of_queries, of_keys = mixed.sequence.segments, mixed.kv_sequence.segments
    by_rows = _first([each.is_sparse for each in of_queries])
    by_columns = _first([each.competes for each in of_keys])
    queries = slots_of(mixed.sequence, by_rows, q.device, valid)
    keys = queries
    if (mixed.sequence, by_rows) != (mixed.kv_sequence, by_columns):
        keys = slots_of(mixed.kv_sequence, by_columns, q.device, valid)
    columns = sum(each.parts * each.num_tiles for each in of_keys if each.competes)
    rows = sum(each.parts * each.num_tiles for each in of_queries if each.is_sparse)
    if columns > mixed.kv_sequence.key_tiles:  # some tile is several of the kernels'
        kept = bitmap.unpack(chosen, mixed.kv_sequence.key_tiles)
        chosen = bitmap.pack(kept.index_select(3, keys.tile_of_part[:columns]))
    if rows > mixed.sequence.query_tiles:
        chosen = chosen.index_select(2, queries.tile_of_part[:rows])
    there = keys.sizes > 0
    all_there = bitmap.pack(there)
    always = bitmap.pack(there & (torch.arange(len(there), device=q.device) >= columns))
    chosen = functional.pad(chosen, (0, len(all_there) - chosen.shape[3])) & all_there | always
    dense = all_there.expand(*chosen.shape[:2], len(queries.sizes) - rows, -1)
    words = torch.cat((chosen, dense), dim=2)
    problem = PaddedProblem(
        _into(queries, q),
        _into(keys, k),
        _into(keys, v),
        torch.where(queries.sizes[:, None] > 0, words, 0),
        queries.sizes,
        keys.sizes,
        mixed.call.scale,
        mixed.call.backend,
    )
    out, lse = fine_of_padded(problem)
    return out.index_select(1, queries.of_tokens), lse.index_select(2, queries.of_tokens)


def _first(marked: list[bool]) -> Order:
    """Places of segments: those that are marked, then the others."""
    places = range(len(marked))
    return (*(at for at in places if marked[at]), *(at for at in places if not marked[at]))


def _into(slots: Slots, x: Tensor) -> Tensor:
    """Tokens (B, S, heads, head_dim) in their slots; what is in the others is not read."""
    into = x.new_empty(len(x), slots.total, *x.shape[2:])
    return into.index_copy_(1, slots.of_tokens, x)


def coarse_rows(mixed: Mixed, branch: Branch) -> Tensor:
    """The coarse output of every query tile, (B, heads, all tiles, head_dim); zero without one."""
    call, queries, keys = mixed.call, branch.queries, branch.keys
    assert queries is not None and keys is not None
    of_keys = list(keys.of)
    of_queries = list(queries.of)
    q_means = queries.joined(0, of_queries)
    k_means, v_means = keys.joined(0, of_keys), keys.joined(1, of_keys)
    empty, scale = keys.empty(of_keys), call.scale
    if empty is not None:
        q_means, k_means = without_empty(q_means, k_means, empty, scale)
        scale = 1.0
    coarse = coarse_attention(q_means, k_means, v_means, scale, call.backend)
    tiles = [segment.num_tiles for segment in mixed.sequence.segments]
    parts = dict(
        zip(of_queries, coarse.split([tiles[place] for place in of_queries], dim=2), strict=True)
    )
    shape = coarse.shape
    rows = [
        parts[place] if place in parts else coarse.new_zeros(*shape[:2], count, shape[3])
        for place, count in enumerate(tiles)
    ]
    return torch.cat(rows, dim=2)
