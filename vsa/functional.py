# SPDX-License-Identifier: Apache-2.0
"""The public functions: attention as a whole, its choice of tiles, and its fine stage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from vsa.backends import named
from vsa.stages import cached, eager, inputs, sequences
from vsa.stages.coarse import for_means, tile_means
from vsa.stages.combine import gated_attention, whole
from vsa.stages.fine import fine, tail_means
from vsa.stages.inputs import DEFAULT_TILE, Tile
from vsa.stages.options import FineOptions, Options, asked_for
from vsa.stages.select import (
    choose,
    everything,
    select_and_attend,
    select_by_sub_blocks,
    select_tiles,
)
from vsa.values import checks
from vsa.values.budget import TopK, resolve
from vsa.values.grid import Extent, Grid
from vsa.values.kv_cache import KVCache
from vsa.values.masks import Mask
from vsa.values.precision import Precision, check_tail
from vsa.values.problem import TailMeans
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection, check_is_selection
from vsa.values.sequence import Sequence

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


# What comes back depends on two flags; each pair of them is a type of its own.
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    return_selection: Literal[False] = False,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    return_selection: Literal[True],
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Selection]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    return_selection: Literal[False] = False,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    return_selection: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Selection, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK | None,
    *,
    grid: Extent | Grid | Sequence | None = None,
    kv_grid: Extent | Grid | Sequence | None = None,
    tile: Tile = DEFAULT_TILE,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    selection: Selection | None = None,
    score: Score = "mean",
    text_valid: Tensor | None = None,
    tail: bool = False,
    mask: Mask | None = None,
    cache: KVCache | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    precision: Precision = "native",
    backend: str = "auto",
) -> Any:
    """Video Sparse Attention (Zhang et al., 2025, section 2.2).

    Differentiable in q, k, v and the gates.

    Args:
        q: (B, T, H, W, heads, head_dim), or flat (B, S, heads, head_dim) in raster order (w
            fastest); bf16, fp16, fp32 or fp64; contiguous last dimension, any other strides.
        k: (B, T, H, W, kv_heads, head_dim) or (B, S, kv_heads, head_dim) with the keys' grid;
            kv_heads divides heads.
        v: like k.
        topk: key tiles per query tile: an int (clamped to their number); a float in (0, 1], their
            share, ceil(topk * n), at least 1; a tuple with one of these for each query head; a
            tensor () of one of these on the CPU; or a ``vsa.TopP``, as many as hold a share of the
            softmax. None only beside ``selection``. Numbers that vary do not compile code again.
        grid: (T, H, W), ``vsa.Grid`` or ``vsa.Sequence`` of the queries; None takes it from a
            video-shaped q, or cuts a flat one into runs of 64 tokens.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w), at most 64 in all; "auto" wastes the fewest slots on
            this grid.
        gate_coarse: broadcastable to q; None leaves the coarse output out.
        gate_fine: broadcastable to q; None is 1.
        scale: factor of the scores, by default head_dim ** -0.5.
        selection: a selection to reuse, from an earlier step; the top-k is skipped.
        score: what tiles are chosen by: "mean", the product of their means, or a
            ``vsa.SubBlocks``. The coarse branch is the same by either.
        text_valid: (B, prefix + suffix) bool, or of a sequence's flat segments, which text tokens
            are real; the others are never attended.
        tail: whether key tiles that were not chosen enter the softmax of the fine stage as one key
            each, their mean, with their mean value, that counts as often as the tile has tokens
            (docs/method.md); the log-sum-exp includes them.
        mask: which key tiles a query tile may choose (docs/masks.md): a ``vsa.masks.ChunkCausal``,
            ``TeacherForcing`` or ``Window``, or a bool tensor (n_q, n_k) or (heads, n_q, n_k).
            Others are never kept and take no part in the coarse softmax, and ``topk`` is of what a
            row may choose. A selection brings the mask that it was chosen under.
        cache: a ``vsa.KVCache``, where q, k and v are the current chunk of a video that is made
            chunk by chunk (docs/streaming.md): k and v go into the cache, and q attends all that
            is in there. Without gradients, in its own grids, without a mask.
        return_selection: also return the selection.
        return_lse: also return the fine stage's log-sum-exp.
        precision: "native"; or, for inference, the fine stage in eight bits: "int8", or "fp8",
            which is faster and less exact (docs/backends.md). The choice of tiles is the same.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out, the shape and type of q; then, as asked for, the ``Selection`` and the log-sum-exp, (B,
        heads, S) fp32, natural logarithm, raster order.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument, before any work
            is done.
        RuntimeError: an explicit backend that cannot run here, with what is missing.
    """
    gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
    if cache is not None:
        asked = return_lse, return_selection
        taken = cached.attend(
            (q, k, v), topk, cache, gates, asked, grid=grid, kv_grid=kv_grid, tile=tile,
            scale=scale, selection=selection, score=score, text_valid=text_valid, tail=tail,
            mask=mask, precision=precision, backend=backend,
        )  # fmt: skip
        return asked_for(*taken, return_selection, return_lse)
    if sequences.are_meant(grid, kv_grid, selection):
        of = sequences.Given(
            q, k, v, topk, grid, kv_grid, tile, scale, selection, text_valid, backend, mask
        )
        found = sequences.attention(of, gate_coarse, gate_fine, score, tail, precision)
        if not isinstance(found, sequences.GridCall):
            return asked_for(*found, return_selection, return_lse)
        grid, kv_grid, topk, selection, text_valid = found
    rest = (
        grid, kv_grid, tile, scale, backend, score, return_lse, return_selection, tail, mask,
        precision,
    )  # fmt: skip
    kind = eager.kind_of(q, k, v, gate_fine, gate_coarse, text_valid, selection, topk, rest)
    plan = None if kind is None else eager.plan_of(kind)
    tokens = q, k, v, gate_fine, gate_coarse
    if plan is not None and plan.prepared is not None:
        out, lse, chosen = eager.attend(plan, tokens, text_valid, selection)
        return asked_for(out, chosen, lse, return_selection, return_lse)
    inputs.check_one_choice(mask, selection)
    call = inputs.resolve(
        q, k, v, grid=grid, kv_grid=kv_grid, tile=tile, scale=scale, text_valid=text_valid,
        selection=selection, gates=gates, backend=backend, precision=precision, mask=mask,
    )  # fmt: skip
    for name, gate in gates.items():
        if gate is not None:
            checks.gate(name, gate, q)
    check_tail(call.precision, tail)
    given = selection
    budget = resolve(
        1.0 if given is not None and topk is None else topk, call.kv_grid.num_tiles, call.q.shape[2]
    )
    runs, gives = runs_of(score), (return_lse, return_selection)
    chooses = selection is None and not budget.is_everything
    tail = tail and (chooses or selection is not None)  # else nothing is left out
    fuses_gates = named(call.backend).fuses_gates
    # Means of tiles and runs are one pass; but a plan saves for hooks what the stages save.
    at_once = torch.compiler.is_compiling() or (runs > 1 and not eager.is_hooked())
    if chooses and at_once and fuses_gates and not tail and call.precision == "native":
        with torch.autocast(call.q.device.type, enabled=False):
            out, lse, selection = whole(call, budget, runs, gate_fine, gate_coarse)
        if kind is not None and plan is None:
            eager.remember(kind, call, tokens, budget, gives, runs=runs)
        return asked_for(out, selection, lse, return_selection, return_lse)

    selection = None if selection is None else selection.savable()
    with torch.autocast(call.q.device.type, enabled=False):
        means: list[Tensor] = []
        if gate_coarse is not None or (tail and chooses):
            grids = (call.grid, call.kv_grid, call.kv_grid)
            means = tile_means(for_means(call), grids, call.backend)
        coarse: Tensor | None = None
        if chooses and not means:
            selection = choose(call, budget, runs)
        elif chooses and runs > 1:
            selection = select_by_sub_blocks(call, budget, runs)
        elif chooses and gate_coarse is not None and fuses_gates:
            selection, coarse = select_and_attend(means, budget, call)
        elif chooses:
            selection = select_tiles(means[0], means[1], budget, call)
        elif selection is None:
            selection = everything(call.q, call.grid, call.kv_grid, call.mask)
        of_tail = None
        if tail:
            of_tail = TailMeans(*means[1:]) if means else tail_means(call)
        if gate_coarse is None:
            means = []  # their memory is free for the fine stage
        out, lse = gated_attention(call, selection, means, coarse, gate_fine, gate_coarse, of_tail)

    if kind is not None and plan is None:
        choice, all_tiles = (budget, False) if chooses else (selection, given is None)
        eager.remember(kind, call, tokens, choice, gives, tail, all_tiles, runs)
    return asked_for(out, selection, lse, return_selection, return_lse)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[FineOptions],
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    return_lse: Literal[True],
    **options: Unpack[FineOptions],
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    grid: Extent | Grid | Sequence | None = None,
    kv_grid: Extent | Grid | Sequence | None = None,
    tile: Tile = DEFAULT_TILE,
    scale: float | None = None,
    text_valid: Tensor | None = None,
    tail: bool = False,
    mask: Mask | None = None,
    return_lse: bool = False,
    precision: Precision = "native",
    backend: str = "auto",
) -> Any:
    """The fine stage alone: attention over given tiles, differentiable in q, k and v.

    Args:
        q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
        k: (B, T, H, W, kv_heads, head_dim) or (B, S, kv_heads, head_dim) with the keys' grid;
            kv_heads divides heads.
        v: like k.
        selection: the key tiles of every query tile.
        grid: the queries' grid, unless the selection knows it or q is video-shaped.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w) where ``grid`` is not a ``vsa.Grid``.
        scale: factor of the scores, by default head_dim ** -0.5.
        text_valid: (B, prefix + suffix) bool, which text tokens are real.
        tail: of the tiles outside of the selection, as in ``vsa.attention``.
        mask: which tiles a query tile may choose; a selection outside of it is an error. That is
            looked for, and waits for the device, where the selection was not chosen under it.
        return_lse: also return the log-sum-exp, itself differentiable.
        precision: "native", "int8" or "fp8", as in ``vsa.attention``.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out like q, and with ``return_lse`` (B, heads, S) fp32 in natural logarithms.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    if sequences.are_meant(grid, kv_grid, selection):
        of = sequences.Given(
            q, k, v, None, grid, kv_grid, tile, scale, selection, text_valid, backend, mask
        )
        same = sequences.block_sparse_attention(of, tail, precision)
        if not isinstance(same, sequences.GridCall):
            return same if return_lse else same[0]
        grid, kv_grid, _, selection, text_valid = same
    rest = grid, kv_grid, tile, scale, backend, "mean", return_lse, False, tail, mask, precision
    kind = eager.kind_of(q, k, v, None, None, text_valid, selection, None, rest)
    plan = None if kind is None else eager.plan_of(kind)
    if plan is not None and plan.prepared is not None:
        planned, of_rows, _ = eager.attend(plan, (q, k, v, None, None), text_valid, selection)
        return (planned, of_rows) if return_lse else planned
    check_is_selection(selection)
    call = inputs.resolve(
        q, k, v, grid=grid, kv_grid=kv_grid, tile=tile, scale=scale, text_valid=text_valid,
        selection=selection, backend=backend, precision=precision, mask=mask,
    )  # fmt: skip
    check_tail(call.precision, tail)
    is_plain = mask is None or inputs.check_inside(selection, call)
    selection = selection.savable()
    if tail:
        with torch.autocast(call.q.device.type, enabled=False):
            out, lse = fine(call, selection, tail_means(call))
    else:
        out, lse = fine(call, selection)
    out = out.view(call.shape)
    if kind is not None and plan is None and is_plain:  # else each bitmap is to be read
        tokens = q, k, v, None, None
        eager.remember(kind, call, tokens, selection, (return_lse, False), tail)
    return (out, lse) if return_lse else out


def select(
    q: Tensor,
    k: Tensor,
    topk: TopK | None,
    *,
    grid: Extent | Grid | Sequence | None = None,
    kv_grid: Extent | Grid | Sequence | None = None,
    tile: Tile = DEFAULT_TILE,
    scale: float | None = None,
    must: Tensor | Literal["self"] | None = None,
    score: Score = "mean",
    mask: Mask | None = None,
    backend: str = "auto",
) -> Selection:
    """Choose the key tiles with the largest scores for every query tile.

    Args:
        q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
        k: (B, T, H, W, kv_heads, head_dim) or (B, S, kv_heads, head_dim) with the keys' grid;
            kv_heads divides heads, and each query head chooses for itself.
        topk: an int, key tiles per query tile; a float in (0, 1], their share: ceil(topk * n), at
            least 1; a tuple with one of these for each query head; or a ``vsa.TopP``, as many as
            hold a share of the softmax.
        grid: the queries' grid, as in ``vsa.attention``.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w), or "auto".
        scale: factor of the scores, by default head_dim ** -0.5; only its sign matters here, but
            for a ``vsa.TopP`` or a ``vsa.SubBlocks``.
        must: tiles that are always kept, (n_q, n_k) bool or "self" for each tile itself. They come
            first and count inside ``topk``; if more are forced than ``topk``, all of them stay.
        score: "mean", the product of the means of two tiles, or a ``vsa.SubBlocks``.
        mask: which tiles a query tile may choose, as in ``vsa.attention``. A tile that ``must``
            forces outside of a rule is an error; of a tensor the mask wins.
        backend: "auto", "hopper", "emulated", "flex" or "torch": who computes means and choice.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    if sequences.are_meant(grid, kv_grid, None):
        of = sequences.Given(q, k, k, topk, grid, kv_grid, tile, scale, None, None, backend, mask)
        found = sequences.select(of, must, score)
        if isinstance(found, Selection):
            return found
        grid, kv_grid, topk = found[:3]
    call = inputs.resolve(
        q, k, k, grid=grid, kv_grid=kv_grid, tile=tile, scale=scale, backend=backend, mask=mask
    )
    budget = resolve(topk, call.kv_grid.num_tiles, call.q.shape[2])
    runs = runs_of(score)
    inputs.check_must(must, call.q, call.grid, call.kv_grid, call.mask)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return choose(call, budget, runs, must)
