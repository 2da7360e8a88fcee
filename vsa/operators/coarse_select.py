# SPDX-License-Identifier: Apache-2.0
"""The operators of coarse and select: tile means, the choice of tiles, attention of tile means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsa.backends import named
from vsa.backends.tiles import accumulation_dtype
from vsa.operators.schema import operator
from vsa.values import bitmap
from vsa.values.budget import counts_and_mass, shares_of
from vsa.values.grid import Grid
from vsa.values.problem import CoarseValues, SubBlockScores, TileScores
from vsa.values.tile_mask import mask_of


@torch.library.custom_op("vsa::tile_means", mutates_args=())
def tile_means(xs: Sequence[Tensor], grids: Sequence[int], backend: str) -> list[Tensor]:
    """Mean of the tokens of every tile; one launch for up to three tensors on a Hopper GPU.

    Args:
        xs: (B, length, heads, head_dim) each, any strides.
        grids: their grids, eight ints each.
        backend: name of the backend that computes it, never "auto".

    Returns:
        (B, heads, num_tiles, head_dim) each, fp32 (fp64 for fp64 inputs), contiguous.
    """
    return named(backend).tile_means(xs, _grids(grids))


def _grids(ints: Sequence[int]) -> list[Grid]:
    return [Grid.from_ints(ints[start : start + 8]) for start in range(0, len(ints), 8)]


@tile_means.register_fake
def _(xs, grids, backend):
    return [
        x.new_empty(x.shape[0], x.shape[2], grid.num_tiles, x.shape[3], dtype=accumulation_dtype(x))
        for x, grid in zip(xs, _grids(grids), strict=True)
    ]


def _save_types(ctx, inputs, output):
    xs, ctx.grids, ctx.backend = inputs
    ctx.dtypes = [x.dtype for x in xs]
    ctx.set_materialize_grads(False)


def _spread_means(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    grids = _grids(ctx.grids)
    alike: dict[tuple[int, torch.dtype], dict[int, Tensor]] = {}
    for at, (grad, grid, dtype) in enumerate(zip(grads, grids, ctx.dtypes, strict=True)):
        if grad is not None:  # grids by identity, since to compare symbols would fix them
            alike.setdefault((id(grid), dtype), {})[at] = grad
    spread: list[Tensor | None] = [None] * len(grads)
    for (_, dtype), some in alike.items():
        grid = grids[next(iter(some))]
        found = named(ctx.backend).spread_means([*some.values()], grid, dtype)
        for at, x in zip(some, found, strict=True):
            spread[at] = x
    return spread, None, None


tile_means.register_autograd(_spread_means, setup_context=_save_types)


def _select(scores: TileScores, values: CoarseValues | None = None) -> tuple[Tensor, Tensor | None]:
    counts, mass = counts_and_mass(
        scores.topk, scores.mass, scores.numbers, scores.k_means.shape[2]
    )
    shares = shares_of(scores.shares, scores.numbers)
    scores = scores._replace(topk=counts, mass=mass, shares=shares)
    return named(scores.backend).select(scores, values.v_means if values else None)


def _empty_bitmap(scores: TileScores) -> Tensor:
    columns = bitmap.num_words(scores.k_means.shape[2])
    return scores.q_means.new_empty(*scores.q_means.shape[:3], columns, dtype=torch.int32)


# Tiles are taken in order: those of `must`, then by falling score. Equal scores (+0 and -0 are
# equal) go to the lowest tile, NaN counts as the lowest score. A row stops when it has `topk` tiles
# and they hold `mass` of the softmax over the row's scores (see vsa.TopP), but not before all of
# `must`. The result is the bitmap, (B, heads, n_q, words) int32.
select_tiles = operator(
    "select_tiles",
    (TileScores,),
    "Tensor",
    compute=lambda scores: _select(scores)[0],
    fake=_empty_bitmap,
)

# The same, and the coarse attention out of the same scores, (B, heads, n_q, channels of v_means),
# the type of the means, contiguous, without gradient.
select_and_attend = operator(
    "select_and_attend",
    (TileScores, CoarseValues),
    "(Tensor, Tensor)",
    compute=_select,
    fake=lambda scores, values: (
        _empty_bitmap(scores),
        scores.q_means.new_empty(*scores.q_means.shape[:3], values.v_means.shape[3]),
    ),
)


def _select_by_sub_blocks(asked: SubBlockScores) -> Tensor:
    counts, mass = counts_and_mass(asked.topk, asked.mass, asked.numbers, asked.grids[1].num_tiles)
    for name, x, grid in zip("qk", (asked.q, asked.k), asked.grids, strict=True):
        grid.check_length(name, x.shape[1])
    shares = shares_of(asked.shares, asked.numbers)
    asked = asked._replace(topk=counts, mass=mass, shares=shares)
    return named(asked.backend).select_by_sub_blocks(asked)[0]


def _empty_choice(asked: SubBlockScores) -> Tensor:
    grid, kv_grid = asked.grids
    rows = asked.q.shape[0], asked.q.shape[2], grid.num_tiles
    return asked.q.new_empty(*rows, bitmap.num_words(kv_grid.num_tiles), dtype=torch.int32)


# The choice of select_tiles, by the scores of vsa.SubBlocks(runs).
select_by_sub_blocks = operator(
    "select_by_sub_blocks",
    (SubBlockScores,),
    "Tensor",
    compute=_select_by_sub_blocks,
    fake=_empty_choice,
)


@torch.library.custom_op("vsa::coarse_attention", mutates_args=())
def coarse_attention(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    scale: float,
    backend: str,
    rule: Sequence[int] | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Attention of tile means, in full precision whatever the process allows elsewhere.

    Args:
        q_means: (B, heads, n_q, head_dim) fp32.
        k_means: (B, kv_heads, n_k, head_dim) fp32.
        v_means: like k_means.
        scale: factor of the scores.
        backend: name of the backend that computes it, never "auto".
        rule: which tiles a row may attend, see ``vsa.values.tile_mask.TileMask``.
        allowed: the same as a tensor.

    Returns:
        Like q_means, contiguous; without gradient.
    """
    mask = mask_of(rule or (), allowed)
    return named(backend).coarse_attention(q_means, k_means, v_means, scale, mask, exact=True)


@coarse_attention.register_fake
def _(q_means, k_means, v_means, scale, backend, rule=None, allowed=None):
    return q_means.new_empty(q_means.shape)
