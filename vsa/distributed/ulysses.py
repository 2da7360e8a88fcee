# SPDX-License-Identifier: Apache-2.0
"""Exact sequence parallelism: the whole sequence of some heads on every rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from torch import Tensor

from vsa.distributed import caches
from vsa.distributed.agreement import agree, can_agree, refuse
from vsa.distributed.arrangement import (
    GATES,
    Arrangement,
    Asked,
    HeadGroup,
    Tensors,
    arrange,
    flat,
)
from vsa.distributed.exchange import (
    Exchange,
    Transport,
    send_heads,
    send_tokens,
    take_heads,
    take_tokens,
    to_heads,
)
from vsa.distributed.selections import joined, of_heads
from vsa.distributed.shards import Ranks, ranks_of
from vsa.distributed.text import Text, for_every_rank
from vsa.functional import attention
from vsa.stages import eager, inputs
from vsa.values import checks
from vsa.values.budget import TopK
from vsa.values.grid import Extent, Grid
from vsa.values.kv_cache import KVCache
from vsa.values.masks import Mask
from vsa.values.precision import Precision
from vsa.values.remembered import Remembered
from vsa.values.score import Score
from vsa.values.selection import Selection

_arranged: weakref.WeakKeyDictionary[Any, Remembered[Arrangement]] = weakref.WeakKeyDictionary()
"""For each process group, how calls run that its ranks have agreed on."""


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    grid: Extent | Grid | None = None,
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
    mask: Mask | None = None,
    cache: KVCache | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    precision: Precision = "native",
    backend: str = "auto",
    head_groups: int | None = None,
) -> Any:
    """``vsa.attention`` of a sequence that is sharded over ranks; every rank calls it alike.

    All-to-alls take q, k, v and gates from shards of the sequence to shards of the heads and bring
    the output back; the backward does the same the other way round. Heads travel in groups, so that
    one group is exchanged while another is computed, and q and k of the first before its v.
    Differentiable once, in q, k, v and the gates. What is the same on all ranks, such as a gate per
    head, gets its gradient in parts: add them over the group, as for weights.

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
        grid: (T, H, W) or ``vsa.Grid`` of the whole sequence; None only beside ``cache``.
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
        mask: as in ``vsa.attention``, for the whole sequence and all heads.
        cache: this rank's ``vsa.KVCache``, where the sequence is the current chunk of a video: it
            holds the heads that come to this rank, kv_heads // gcd(kv_heads, ranks) of them, which
            is kv_heads / ranks where that is whole (docs/streaming.md). Text comes along where
            ``grid`` is a ``vsa.Grid`` with the cache's prefix. Not on a 2-D mesh.
        return_selection: also return the selection of heads / P heads that this rank computed.
        return_lse: also return the log-sum-exp of this rank's tokens.
        precision: as in ``vsa.attention``, for inference.
        backend: as in ``vsa.attention``.
        head_groups: most groups of heads that travel one after the other; None decides by size.
            With a cache all heads travel together.

    Returns:
        out like q; then, as asked for, the ``Selection`` and the log-sum-exp, (B, heads, S_r).

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument, before anything
            is communicated; also on all ranks where they differ in an argument, which is found out
            at the first call of a kind, outside of torch.compile. So are caches that differ or
            stand at different chunks, at the first call of each chunk; then none is written.
        RuntimeError: torch.distributed is not initialised, an explicit backend cannot run here, or
            another rank has raised an error, has ended or has not come within the group's timeout.
            NCCL reports the last two by itself.
    """
    given = Tensors(q, k, v, gate_coarse, gate_fine, text_valid, selection)
    asked = Asked(
        topk,
        grid,
        lengths,
        kv_grid,
        kv_lengths,
        tile,
        scale,
        score,
        text,
        tail,
        mask,
        return_selection,
        return_lse,
        precision,
        backend,
        head_groups,
        cache,
    )
    return attend_shards(given, asked, ranks_of(group))


def attend_shards(
    given: Tensors, asked: Asked, ranks: Ranks, transport: Transport = "plain"
) -> Any:
    """``ulysses_attention`` itself.

    Args:
        given: tensors.
        asked: all other arguments.
        ranks: of the group.
        transport: by which all-to-alls; bench/parallel.py compares them.
    """
    key = _key(given, asked, ranks)
    known = None if key is None else _arranged.get(ranks.heads)
    how = None if known is None else known.get(key)
    if how is None:
        given, how = _arrange(given, asked, ranks)
        if key is not None:
            if ranks.heads not in _arranged:
                _arranged[ranks.heads] = Remembered(256)
            _arranged[ranks.heads].put(key, how)
    else:
        given = _cast(given)
    if asked.cache is not None:
        caches.agree_on(asked.cache, how.whole.prefix > 0, ranks)
    return _run(how, given, asked, ranks, transport)


def _key(given: Tensors, asked: Asked, ranks: Ranks) -> Hashable | None:
    """All that a call depends on besides the numbers in its tensors; None if that is not known."""
    q, k, v, gate_coarse, gate_fine, text_valid, selection = given
    rest = (
        *(asked.grid, asked.kv_grid, asked.tile, asked.scale, asked.backend, asked.score),
        *(asked.return_lse, asked.return_selection, asked.tail, asked.mask, asked.precision),
    )
    kind = eager.kind_of(q, k, v, gate_fine, gate_coarse, text_valid, selection, asked.topk, rest)
    counts: list[tuple[object, ...] | None] = []
    for of_ranks in (asked.lengths, asked.kv_lengths):
        if not isinstance(of_ranks, (tuple, list, type(None))):
            return None
        counts.append(None if of_ranks is None else tuple(of_ranks))
    given_counts = *(counts[0] or ()), *(counts[1] or ()), asked.head_groups
    exact = {*map(type, given_counts)} <= {int, type(None)}
    if kind is None or not exact or type(asked.text) is not str:
        return None
    columns = None if ranks.queries is None else ranks.queries.group_name
    place = ranks.columns, ranks.rows, ranks.rank, columns
    if not isinstance(asked.cache, (KVCache, type(None))):
        return None
    past = None if asked.cache is None else caches.kind(asked.cache)
    return kind, place, *counts, asked.text, asked.head_groups, past


def _cast(given: Tensors) -> Tensors:
    """q, k and v in the type that they travel in."""
    q, k, v = inputs.under_autocast(*given[:3])
    return given._replace(q=q, k=k, v=v)


def _arrange(given: Tensors, asked: Asked, ranks: Ranks) -> tuple[Tensors, Arrangement]:
    """Check a call with all ranks."""
    groups = [ranks.heads] if ranks.queries is None else [ranks.heads, ranks.queries]
    try:
        for name, x in zip("qkv", given, strict=False):
            flat(name, checks.tensor(name, x))
        given = _cast(given)
        how, alike = arrange(given, asked, ranks)
    except (ValueError, TypeError, RuntimeError) as error:
        if can_agree():
            for group in groups:
                refuse(group, error)
        raise
    if can_agree():
        for group in groups:
            agree(group, alike)
    return given, how


def _run(how: Arrangement, given: Tensors, asked: Asked, ranks: Ranks, transport: Transport) -> Any:
    """Exchange and compute, group by group of heads."""
    xs, gates = _that_travel(how, given, ranks)
    text = None
    if how.replicated:
        grids = how.whole, how.keys, how.keys, *[how.whole] * len(how.travelling)
        text = Text(xs, grids, ranks)
        xs = text.videos
    sent = Exchange(how.sent, ranks.heads, transport)
    returned = Exchange(how.returned, ranks.heads, transport)
    buffers = send_heads(sent, xs)
    on_the_way: list[Tensor] = []
    selections: list[Selection] = []
    for number, heads in enumerate(how.groups):
        parcels = how.sent.groups[number]
        own = buffers[parcels[0] : parcels[-1] + 1]
        arrived = take_heads(sent, number, own, heads.later)
        if text is not None:
            arrived = text.around(arrived, how.heads[number])
        q, k, v, *moved = arrived
        if ranks.rows > 1:  # every row gets the keys and values of all rows
            copies = [x.repeat(1, 1, ranks.rows, 1) for x in (k, v)]
            k, v = to_heads(copies, [how.kv_rows] * 2, ranks.queries)
        of_group = _of_group(gates | dict(zip(how.travelling, moved, strict=True)), heads, how)
        part = Tensors(q, k, v, *of_group, given.text_valid, given.selection)

        def ready(later: Sequence[int] = heads.later) -> None:
            for parcel in later:
                sent.wait(parcel, buffers[parcel])

        out, lse, chosen = _attend(how, part, heads, asked, ready)
        back = [out]
        if lse is not None:
            back.append(lse.transpose(1, 2).unsqueeze(-1))
        if chosen is not None:
            selections.append(chosen)
        if how.replicated:
            back = [for_every_rank(x, how.whole, how.lengths) for x in back]
        on_the_way += send_tokens(returned, number, back)
    out, *rest = take_tokens(returned, on_the_way)
    extras: list[Any] = [joined(selections)] if asked.return_selection else []
    extras += [x.squeeze(-1).transpose(1, 2) for x in rest]
    return (out, *extras) if extras else out


def _that_travel(
    how: Arrangement, given: Tensors, ranks: Ranks
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Tensors that are exchanged, and gates that are not."""
    q, k, v = given[:3]
    if how.repeats > 1:
        k, v = (x.repeat_interleave(how.repeats, dim=2) for x in (k, v))
    xs = [q, k, v]
    gates: dict[str, Tensor | None] = {}
    for name, gate in zip(GATES, (given.gate_coarse, given.gate_fine), strict=True):
        whole = None if gate is None else gate[(None,) * (4 - gate.ndim)]
        if whole is None or name not in how.travelling:
            gates[name] = whole
            continue
        xs.append(whole if whole.shape[2] > 1 else whole.expand(-1, -1, ranks.columns, -1))
    return xs, gates


def _of_group(
    gates: dict[str, Tensor | None], heads: HeadGroup, how: Arrangement
) -> tuple[Tensor | None, Tensor | None]:
    """The heads of a group of both gates: those that came with it have no others."""
    coarse, fine = (
        gate
        if gate is None or name in how.travelling or gate.shape[2] == 1
        else gate[:, :, heads.of_all]
        for name, gate in ((name, gates[name]) for name in GATES)
    )
    return coarse, fine


def _attend(
    how: Arrangement, part: Tensors, heads: HeadGroup, asked: Asked, ready: Callable[[], None]
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Attention of a group of heads; ``ready`` makes the stream wait for what q and k are not in.

    A prepared call chooses tiles before that.
    """
    selection = part.selection
    if selection is not None and len(how.groups) > 1:
        selection = of_heads(selection, heads.heads)
    q, k, v, gate_coarse, gate_fine, text_valid, _ = part
    mask = how.mask
    if isinstance(mask, Tensor) and mask.ndim == 3 and len(mask) > 1:
        mask = mask[heads.of_all]
    if heads.later:
        tile = inputs.DEFAULT_TILE
        rest = how.grid, how.keys, tile, asked.scale, asked.backend, asked.score
        flags = asked.return_lse, asked.return_selection, asked.tail, mask, asked.precision
        kind = eager.kind_of(
            q, k, v, gate_fine, gate_coarse, text_valid, selection, heads.topk, rest + flags
        )
        plan = None if kind is None else eager.plan_of(kind)
        if plan is not None and plan.prepared is not None:
            tokens = q, k, v, gate_fine, gate_coarse
            out, lse, chosen = eager.attend(plan, tokens, text_valid, selection, ready)
            return (
                out,
                lse if asked.return_lse else None,
                chosen if asked.return_selection else None,
            )
    ready()
    call: Any = attention  # what it returns depends on two flags
    found = call(
        q,
        k,
        v,
        heads.topk,
        grid=how.grid,
        kv_grid=how.keys if asked.cache is None else None,
        gate_coarse=gate_coarse,
        gate_fine=gate_fine,
        scale=asked.scale,
        selection=selection,
        score=asked.score,
        text_valid=text_valid,
        tail=asked.tail,
        mask=mask,
        cache=asked.cache,
        return_selection=asked.return_selection,
        return_lse=asked.return_lse,
        precision=asked.precision,
        backend=asked.backend,
    )
    out, *extras = found if isinstance(found, tuple) else (found,)
    chosen = extras.pop(0) if asked.return_selection else None
    return out, extras[0] if asked.return_lse else None, chosen
