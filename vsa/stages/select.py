# SPDX-License-Identifier: Apache-2.0
"""select: keep the best key tiles of every query tile (paper, section 2.2, TopK), as a bitmap.

No gradient flows through the choice. Scores that are equal go to the lowest key tile; NaN counts as
the lowest score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vsa.backends import named
from vsa.operators import coarse_select
from vsa.stages.coarse import tile_means
from vsa.stages.inputs import Inputs
from vsa.values import bitmap
from vsa.values.budget import Budget
from vsa.values.grid import Grid
from vsa.values.problem import CoarseValues, SubBlockScores, TileScores
from vsa.values.selection import Selection
from vsa.values.tile_mask import TileMask


def choose(
    call: Inputs, budget: Budget, runs: int, must: Tensor | Literal["self"] | None = None
) -> Selection:
    """The choice from queries and keys, without a coarse branch.

    Args:
        call: checked inputs.
        budget: tiles of a row.
        runs: of a tile, whose means are scored; 1 for its mean.
        must: tiles that are always kept, (n_q, n_k) bool, or "self" for each tile itself.
    """
    if runs > 1:
        return select_by_sub_blocks(call, budget, runs, must)
    of_keys = call.q.detach(), call.k.detach()
    means = tile_means(of_keys, (call.grid, call.kv_grid), call.backend)
    return select_tiles(means[0], means[1], budget, call, must)


def select_by_sub_blocks(
    call: Inputs, budget: Budget, runs: int, must: Tensor | Literal["self"] | None = None
) -> Selection:
    """The choice by the means of each tile's runs; arguments as in ``choose``."""
    most, must = _forced(must, budget, call)
    asked = SubBlockScores(
        call.q.detach(),
        call.k.detach(),
        must,
        budget.counts,
        budget.mass,
        budget.numbers,
        call.grid.as_ints(),
        call.kv_grid.as_ints(),
        runs,
        call.scale,
        call.backend,
        *_masked(budget, call),
    )
    who = named(call.backend)
    composed = "select_by_sub_blocks" in who.composed
    chosen = (
        who.select_by_sub_blocks(asked)[0]
        if composed
        else coarse_select.select_by_sub_blocks(*asked)
    )
    return Selection(chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, most, call.mask)


def select_tiles(
    q_means: Tensor,
    k_means: Tensor,
    budget: Budget,
    call: Inputs,
    must: Tensor | Literal["self"] | None = None,
) -> Selection:
    """The choice from tile means.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        budget: tiles of a row.
        call: checked inputs.
        must: tiles that are always kept, (n_q, n_k) bool, or "self" for each tile itself.
    """
    most, must = _forced(must, budget, call)
    scores = _scores(q_means.detach(), k_means.detach(), must, budget, call)
    who = named(call.backend)
    chosen = (
        who.select(scores)[0] if "select" in who.composed else coarse_select.select_tiles(*scores)
    )
    return Selection(chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, most, call.mask)


def select_and_attend(
    means: Sequence[Tensor], budget: Budget, call: Inputs
) -> tuple[Selection, Tensor]:
    """``select_tiles``, and the coarse attention out of the same scores.

    Args:
        means: of q (B, heads, n_q, head_dim), of k and of v (B, kv_heads, n_k, head_dim).
        budget: tiles of a row.
        call: checked inputs.

    Returns:
        The selection, and the coarse output (B, heads, n_q, head_dim), without gradient.
    """
    q_means, k_means, v_means = means
    scores = _scores(q_means, k_means, None, budget, call)
    chosen, coarse = coarse_select.select_and_attend(*scores, *CoarseValues(v_means))
    selection = Selection(
        chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, budget.most, call.mask
    )
    return selection, coarse


def _forced(
    must: Tensor | Literal["self"] | None, budget: Budget, call: Inputs
) -> tuple[int | None, Tensor | None]:
    """The most tiles of a row, None where it is not known beforehand, and the forced ones."""
    if isinstance(must, str):
        must = torch.eye(call.grid.num_tiles, dtype=torch.bool, device=call.q.device)
        return budget.most, must
    return budget.most if must is None else None, must


def _scores(
    q_means: Tensor, k_means: Tensor, must: Tensor | None, budget: Budget, call: Inputs
) -> TileScores:
    return TileScores(
        q_means,
        k_means,
        must,
        budget.counts,
        budget.mass,
        budget.numbers,
        call.scale,
        call.backend,
        *_masked(budget, call),
    )


def _masked(
    budget: Budget, call: Inputs
) -> tuple[()] | tuple[Sequence[int], Tensor | None, Sequence[float]]:
    """What operators are told of a mask: a rule, a tensor, and shares of what rows may choose."""
    return () if call.mask is None else (*call.mask, budget.shares)


def everything(q: Tensor, grid: Grid, kv_grid: Grid, mask: TileMask | None = None) -> Selection:
    """All key tiles that query tiles of q (B, ..., heads, head_dim) may choose: dense attention."""
    columns = kv_grid.num_tiles
    if mask is None:
        row = bitmap.full(columns, q.device)
    else:
        row = bitmap.pack(mask.matrix(grid.num_tiles, q.device))
    rows = row.expand(q.shape[0], q.shape[-2], grid.num_tiles, -1).contiguous()
    return Selection(rows, columns, grid, kv_grid, columns, mask)
