# SPDX-License-Identifier: Apache-2.0
"""Which tiles of a sequence are chosen, and among which.

A segment with a budget of its own is a competition by itself; all others that compete are one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vsa.backends import named
from vsa.operators import coarse_select
from vsa.stages.sequences.call import Mixed, check_no_topk
from vsa.stages.sequences.means import TileMeans, without_empty
from vsa.values import bitmap, budget
from vsa.values.budget import Budget, TopK
from vsa.values.problem import TileScores
from vsa.values.selection import Selection
from vsa.values.sequence import Sequence


class Pool(NamedTuple):
    """Segments whose tiles compete with each other.

    Attributes:
        places: of the segments in the sequence of the keys.
        budget: tiles that a row keeps of them.
    """

    places: list[int]
    budget: Budget


def pools_of(sequence: Sequence, topk: TopK | None, heads: int) -> list[Pool]:
    """Who competes with whom for what.

    Args:
        sequence: the keys'.
        topk: of the call, for segments without a budget of their own.
        heads: query heads.

    Raises:
        ValueError, TypeError: in one sentence that names ``topk``.
    """
    competing = [place for place, each in enumerate(sequence.segments) if each.competes]
    shared = [place for place in competing if sequence.segments[place].topk is None]
    if not shared:
        check_no_topk(topk)
    pools = []
    for place in competing:
        if place in shared:
            if place == shared[0]:
                tiles = sum(sequence.segments[each].num_tiles for each in shared)
                pools.append(Pool(shared, budget.resolve(topk, tiles, heads)))
        else:
            segment = sequence.segments[place]
            pools.append(Pool([place], budget.resolve(segment.topk, segment.num_tiles, heads)))
    return pools


def choose(
    mixed: Mixed,
    queries: TileMeans,
    keys: TileMeans,
    pools: list[Pool],
    must: Tensor | None = None,
) -> Selection:
    """The choice; nothing flows through it.

    Args:
        mixed: checked inputs.
        queries: means, of q first.
        keys: means, of k first.
        pools: who competes.
        must: (n_q, n_k) bool, tiles that are always kept; they count inside their pool's budget.
    """
    kv_sequence = mixed.kv_sequence
    rows = [place for place, each in enumerate(mixed.sequence.segments) if each.is_sparse]
    q_means = queries.joined(0, rows).detach()
    if len(pools) == 1 and pools[0].budget.is_everything:
        return everything(mixed)
    of_segments: dict[int, Tensor] = {}
    words = None
    for pool in pools:
        k_means = keys.joined(0, pool.places).detach()
        forced = None
        if must is not None:
            of = [must[:, kv_sequence.key_tiles_of(place)] for place in pool.places]
            forced = torch.cat(of, dim=1)
        words = _chosen(mixed, q_means, k_means, keys.empty(pool.places), pool.budget, forced)
        if len(pools) > 1:
            kept = bitmap.unpack(words, k_means.shape[2])
            sizes = [kv_sequence.segments[place].num_tiles for place in pool.places]
            of_segments.update(zip(pool.places, kept.split(sizes, dim=-1), strict=True))
    if len(pools) > 1:
        words = bitmap.pack(torch.cat([of_segments[place] for place in sorted(of_segments)], -1))
    assert words is not None
    none = queries.empty(rows)
    if none is not None:  # a tile without a query chooses nothing
        words = words.masked_fill(none[:, None, :, None], 0)
    most = [pool.budget.most for pool in pools] if must is None else [None]
    known = [each for each in most if each is not None]
    return Selection(
        words,
        kv_sequence.key_tiles,
        most=sum(known) if len(known) == len(most) else None,
        sequences=(mixed.sequence, kv_sequence),
    )


def _chosen(
    mixed: Mixed,
    q_means: Tensor,
    k_means: Tensor,
    empty: Tensor | None,
    of_rows: Budget,
    forced: Tensor | None,
) -> Tensor:
    """The choice among the tiles of one pool, as a bitmap."""
    call, scale = mixed.call, mixed.call.scale
    if empty is not None:
        q_means, k_means = without_empty(q_means, k_means, empty, scale)
        scale = 1.0
    scores = TileScores(
        q_means.contiguous(),
        k_means.contiguous(),
        None if forced is None else forced.contiguous(),
        of_rows.counts,
        of_rows.mass,
        of_rows.numbers,
        scale,
        call.backend,
    )
    who = named(call.backend)
    words = (
        who.select(scores)[0] if "select" in who.composed else coarse_select.select_tiles(*scores)
    )
    if empty is not None:
        words = words & bitmap.pack(~empty)[:, None, None]
    return words


def everything(mixed: Mixed) -> Selection:
    """All tiles that compete, for all that choose: dense attention."""
    q, columns = mixed.call.q, mixed.kv_sequence.key_tiles
    shape = q.shape[0], q.shape[2], mixed.sequence.query_tiles, -1
    row = bitmap.full(columns, q.device).expand(shape).contiguous()
    return Selection(row, columns, most=columns, sequences=(mixed.sequence, mixed.kv_sequence))


def check_must(must: object, mixed: Mixed) -> Tensor | None:
    """None, "self", or (n_q, n_k) bool on the device of q; as a mask.

    Raises:
        ValueError, TypeError: in one sentence that names ``must``.
    """
    sequence, kv_sequence = mixed.sequence, mixed.kv_sequence
    wanted = (sequence.query_tiles, kv_sequence.key_tiles)
    device = mixed.call.q.device
    if must is None:
        return None
    if isinstance(must, str) and must == "self":
        sparse = [place for place, each in enumerate(sequence.segments) if each.is_sparse]
        compete = [place for place, each in enumerate(kv_sequence.segments) if each.competes]
        if sparse != compete or sequence != kv_sequence:
            raise ValueError(
                'must="self" needs the segments whose queries are sparse to be those that compete, '
                f"but their places are {sparse} and {compete}"
            )
        return torch.eye(wanted[0], dtype=torch.bool, device=device)
    if not isinstance(must, Tensor) or must.dtype != torch.bool:
        kind: Literal["str"] | object = must if isinstance(must, str) else type(must).__name__
        kind = must.dtype if isinstance(must, Tensor) else kind
        raise TypeError(f'must is a bool mask (n_q, n_k) or "self", but it is {kind}')
    if tuple(must.shape) != wanted:
        raise ValueError(
            f"must has to be (n_q, n_k) = {wanted}, the tiles whose queries are sparse and those "
            f"that compete, but its shape is {tuple(must.shape)}"
        )
    if must.device != device:
        raise ValueError(
            f"must has to share the device of q, but it is on {must.device} and q is on {device}"
        )
    return must
