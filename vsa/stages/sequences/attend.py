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

from vsa.backends.tiles import accumulation_dtype
from vsa.stages.coarse import coarse_attention
from vsa.stages.fine import fine, fine_of_padded
from vsa.stages.sequences.call import Mixed
from vsa.stages.sequences.choice import Pool, choose
from vsa.stages.sequences.layout import (
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
from vsa.values.sequence import Sequence


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
        real = real_tokens(mixed.sequence, device, mixed.text_valid)[..., None, None]
    if gate_fine is not None:
        whole = whole * _masked(gate_fine.to(whole.dtype), real)
    if gate_coarse is not None:
        rows = _coarse_rows(mixed, branch)
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
    q, k, v = mixed.call.q, mixed.call.k, mixed.call.v
    kept = _rows_of_all(mixed, selection)
    if mixed.text_valid is None:
        return _in_tiles(mixed, q, k, v, kept, None)
    # Padded tiles have the same sizes in the whole batch, so each element goes by itself.
    found = []
    for b in range(len(q)):
        one = slice(b, b + 1)
        found.append(_in_tiles(mixed, q[one], k[one], v[one], kept[one], mixed.text_valid[b]))
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


def _rows_of_all(mixed: Mixed, selection: Selection) -> Tensor:
    """The choice with what nobody chooses: (B, heads, all query tiles, all key tiles) bool."""
    chosen = selection.mask()
    batch, heads = chosen.shape[:2]
    columns = mixed.kv_sequence.num_tiles
    rows = []
    for place, segment in enumerate(mixed.sequence.segments):
        if not segment.is_sparse:
            rows.append(chosen.new_ones(batch, heads, segment.num_tiles, columns))
            continue
        of_rows = chosen[:, :, mixed.sequence.query_tiles_of(place)]
        parts = [
            of_rows[..., mixed.kv_sequence.key_tiles_of(at)]
            if of_keys.competes
            else chosen.new_ones(batch, heads, segment.num_tiles, of_keys.num_tiles)
            for at, of_keys in enumerate(mixed.kv_sequence.segments)
        ]
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows, dim=2)


def _in_tiles(
    mixed: Mixed, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fine stage over padded tiles, to and fro; ``valid`` (text,) bool for one element."""
    queries = slots_of(mixed.sequence, q.device, valid)
    keys = queries
    if mixed.kv_sequence != mixed.sequence:
        keys = slots_of(mixed.kv_sequence, q.device, valid)
    if _has_parts(mixed.kv_sequence):
        kept = kept.index_select(3, keys.tile_of_part)
    words = bitmap.pack(kept & (keys.sizes > 0))
    if _has_parts(mixed.sequence):
        words = words.index_select(2, queries.tile_of_part)
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


def _has_parts(sequence: Sequence) -> bool:
    """Whether some tile is several of the kernels'."""
    return any(each.parts > 1 for each in sequence.segments)


def _into(slots: Slots, x: Tensor) -> Tensor:
    """Tokens (B, S, heads, head_dim) in their slots; what is in the others is not read."""
    into = x.new_empty(len(x), slots.total, *x.shape[2:])
    return into.index_copy(1, slots.of_tokens, x)


def _coarse_rows(mixed: Mixed, branch: Branch) -> Tensor:
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
