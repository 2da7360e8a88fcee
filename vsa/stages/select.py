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
from vsa.stages.inputs import Inputs
from vsa.values import bitmap
from vsa.values.budget import Budget
from vsa.values.grid import Grid
from vsa.values.problem import CoarseValues, TileScores
from vsa.values.selection import Selection


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
    most = budget.most if must is None or isinstance(must, str) else None
    if isinstance(must, str):
        must = torch.eye(call.grid.num_tiles, dtype=torch.bool, device=q_means.device)
    scores = _scores(q_means.detach(), k_means.detach(), must, budget, call)
    who = named(call.backend)
    chosen = (
        who.select(scores)[0] if "select" in who.composed else coarse_select.select_tiles(*scores)
    )
    return Selection(chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, most)


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
    return Selection(chosen, call.kv_grid.num_tiles, call.grid, call.kv_grid, budget.most), coarse


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
    )


def everything(q: Tensor, grid: Grid, kv_grid: Grid) -> Selection:
    """All key tiles for all query tiles of q (B, ..., heads, head_dim): dense attention."""
    columns = kv_grid.num_tiles
    row = bitmap.full(columns, q.device)
    rows = row.expand(q.shape[0], q.shape[-2], grid.num_tiles, -1).contiguous()
    return Selection(rows, columns, grid, kv_grid, columns)
