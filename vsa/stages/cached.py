# SPDX-License-Identifier: Apache-2.0
"""Attention of the current chunk of a video over a cache of past ones, without gradients.

The same stages as without a cache, in the order of time; only the fine stage reads keys in the
order of slots. Tile means are computed of the current chunk alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends import named
from vsa.stages import eager, inputs
from vsa.stages.coarse import tile_means
from vsa.stages.combine import gated_attention
from vsa.stages.inputs import DEFAULT_TILE, Layout, Tile
from vsa.stages.select import everything, select_and_attend, select_by_sub_blocks, select_tiles
from vsa.values import checks, transforms
from vsa.values.budget import Budget, resolve
from vsa.values.grid import Grid
from vsa.values.kv_cache import KVCache
from vsa.values.kv_checks import check_kind, check_no_gradient
from vsa.values.precision import check_tail
from vsa.values.problem import TailMeans
from vsa.values.score import runs_of
from vsa.values.selection import Selection, check_fits, check_is_selection


class Checked(NamedTuple):
    """A call that may write to its cache.

    Attributes:
        call: its inputs, with the current chunk's keys and the grid of all.
        budget: tiles per row; everything beside a selection without one.
        chooses: whether tiles are chosen.
        runs: sub-blocks by which they are scored.
    """

    call: inputs.Inputs
    budget: Budget
    chooses: bool
    runs: int


def check(
    tokens: tuple[Tensor, Tensor, Tensor],
    topk: object,
    cache: KVCache,
    gates: Mapping[str, Tensor | None],
    *,
    grid: Layout | None,
    kv_grid: object,
    tile: Tile,
    selection: Selection | None,
    score: Any,
    tail: bool,
    mask: object,
    precision: str,
    **options: Any,
) -> Checked:
    """All that may be refused but the shapes of gates; arguments as in ``vsa.attention``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_is_cache(cache)
    check_beside(mask, kv_grid, selection)
    _check_tokens(tokens)
    own = grid_under(cache, tokens[0], grid, tile)
    of_chunk = inputs.resolve(*tokens, grid=own, gates=gates, precision=precision, **options)
    for name, x in zip("qkv", (of_chunk.q, of_chunk.k, of_chunk.v), strict=True):
        check_kind(name, x, cache.dtype, cache.device)
    _check_keys(of_chunk.k, cache)
    for name, gate in gates.items():
        if gate is not None:
            _check_followed(name, gate)
            check_no_gradient(name, gate)
    check_tail(of_chunk.precision, tail)
    cache.check_room(with_text=own.prefix > 0)
    call = replace(of_chunk, kv_grid=cache.kv_grid)
    given = selection is not None
    if selection is not None:
        check_fits(selection, call.q, call.grid, call.kv_grid)
    share = 1.0 if given and topk is None else topk
    budget = resolve(share, call.kv_grid.num_tiles, call.q.shape[2])
    return Checked(call, budget, not given and not budget.is_everything, runs_of(score))


def attend(
    tokens: tuple[Tensor, Tensor, Tensor],
    topk: object,
    cache: KVCache,
    gates: Mapping[str, Tensor | None],
    gives: tuple[bool, bool],
    *,
    grid: Layout | None,
    kv_grid: object,
    tile: Tile,
    scale: float | None,
    text_valid: Tensor | None,
    selection: Selection | None,
    score: Any,
    tail: bool,
    mask: object,
    precision: str,
    backend: str,
) -> tuple[Tensor, Selection | None, Tensor | None]:
    """Arguments as in ``vsa.attention``; ``gives``: whether log-sum-exp and choice are results.

    Returns:
        out, and as asked for the selection in the order of time, and the log-sum-exp.

    Raises:
        ValueError, TypeError: naming the argument; then the cache is as it was.
    """
    given = *tokens, gates["gate_fine"], gates["gate_coarse"]
    rest = grid, kv_grid, tile, scale, backend, score, *gives, tail, mask, precision
    kind: Hashable = None
    if isinstance(cache, KVCache):
        kind = eager.kind_of(*given, text_valid, selection, topk, rest, cache.kind)
    plan = None if kind is None else eager.plan_of(kind)
    if plan is not None and plan.prepared is not None:
        out, lse, chosen = eager.attend(plan, given, text_valid, selection, None, cache.memory)
        cache.note_written(plan.grid.prefix > 0)
        return out, chosen, lse
    of_chunk, budget, chooses, runs = check(
        tokens, topk, cache, gates, grid=grid, kv_grid=kv_grid, tile=tile, scale=scale,
        text_valid=text_valid, selection=selection, score=score, tail=tail, mask=mask,
        precision=precision, backend=backend,
    )  # fmt: skip
    for name, gate in gates.items():
        checks.gate(name, gate, tokens[0])
    ring, is_given = cache.ring, selection is not None
    tail = tail and (chooses or is_given)  # else nothing is left out

    with torch.no_grad(), torch.autocast(of_chunk.q.device.type, enabled=False):
        grids = (of_chunk.grid,) * 3
        q_means, *of_keys = tile_means(
            (of_chunk.q, of_chunk.k, of_chunk.v), grids, of_chunk.backend
        )
        cache.write(of_chunk.k, of_chunk.v, of_keys)
        k, v = cache.keys_and_values()
        call = replace(of_chunk, k=k, v=v)
        means = [q_means, *cache.means(in_time=True)]
        coarse: Tensor | None = None
        if chooses and runs > 1:
            in_time = replace(call, k=cache.keys_in_time())
            selection = select_by_sub_blocks(in_time, budget, runs)
        elif chooses and gates["gate_coarse"] is not None and named(call.backend).fuses_gates:
            selection, coarse = select_and_attend(means, budget, call)
        elif chooses:
            selection = select_tiles(means[0], means[1], budget, call)
        elif selection is None:
            selection = everything(call.q, call.grid, call.kv_grid)
        placed = cache.in_slots(selection) if chooses or is_given else selection
        of_tail = TailMeans(*cache.means(in_time=False)) if tail else None
        out, lse = gated_attention(
            call,
            placed,
            means if gates["gate_coarse"] is not None else [],
            coarse,
            gates["gate_fine"],
            gates["gate_coarse"],
            of_tail,
        )
    if kind is not None and plan is None:
        choice, all_tiles = (budget, False) if chooses else (selection, not is_given)
        eager.remember(kind, of_chunk, given, choice, gives, tail, all_tiles, runs, ring)
    return out, selection, lse


def check_is_cache(cache: object) -> None:
    """A ``vsa.KVCache``."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a vsa.KVCache, but it is of type {type(cache).__name__}")


def check_beside(mask: object, kv_grid: object, selection: Selection | None) -> None:
    """What a call with a cache leaves to the cache."""
    if mask is not None:
        raise ValueError(
            "mask cannot stand beside cache, which holds the chunks that the current one sees: "
            "give sinks and capacity to vsa.KVCache, and mask to training"
        )
    if kv_grid is not None:
        raise ValueError(
            f"kv_grid follows from cache, whose chunks the keys are, but it is {kv_grid}: leave it "
            "out"
        )
    if selection is None:
        return
    check_is_selection(selection)
    if selection.under is not None:
        raise ValueError(
            "selection was chosen under a mask, but beside cache it must be one that a call with "
            "the cache returned, or that was chosen without a mask"
        )


def _check_tokens(tokens: tuple[Tensor, Tensor, Tensor]) -> None:
    """Tensors that nothing but their numbers follows, and keys of the queries' chunk."""
    for name, x in zip("qkv", tokens, strict=True):
        _check_followed(name, checks.tensor(name, x))
        check_no_gradient(name, x)
    q, k, _ = tokens
    if k.ndim == q.ndim and k.shape[1:-2] != q.shape[1:-2]:
        raise ValueError(
            f"k has the grid or length {tuple(k.shape[1:-2])} and q has {tuple(q.shape[1:-2])}, "
            "but beside cache both are of the current chunk: past keys are in the cache"
        )


def _check_keys(k: Tensor, cache: KVCache) -> None:
    """The current chunk's keys (B, S, kv_heads, head_dim) have the shape of the past ones."""
    wanted, found = (cache.batch, cache.kv_heads, cache.head_dim), (k.shape[0], *k.shape[-2:])
    if found != wanted:
        raise ValueError(
            f"k must have (batch, kv_heads, head_dim) = {wanted} of the cache, but it has {found}"
        )


def _check_followed(name: str, x: Tensor) -> None:
    if transforms.is_transformed(x):
        raise NotImplementedError(
            f"{name} has a forward-mode tangent or is inside of a transform of torch.func, which a "
            "cache does not follow: train with mask=vsa.masks.ChunkCausal(...)"
        )


def grid_under(cache: KVCache, q: Tensor, grid: Layout | None, tile: Tile) -> Grid:
    """Of the current chunk, with the text before it where q has it."""
    if tile not in (DEFAULT_TILE, "auto", cache.tile):
        raise ValueError(
            f"tile must be that of the cache, {cache.tile}, but it is {tile}: leave it out"
        )
    if not isinstance(grid, Grid):
        if grid is not None and checks.extent("grid", grid) != cache.chunk:
            raise ValueError(
                f"grid must be the chunk of the cache, {cache.chunk}, but it is {grid}"
            )
        alone = cache.grid_of(0)
        has_text = q.ndim == 4 and q.shape[1] == cache.prefix + alone.tokens
        return cache.grid_of(cache.prefix) if has_text else alone
    if grid not in (cache.grid_of(0), cache.grid_of(cache.prefix)):
        raise ValueError(
            f"grid must be {cache.grid_of(0)}, the chunk of the cache, or have its prefix of "
            f"{cache.prefix} text tokens as well, but it is {grid}"
        )
    return grid
