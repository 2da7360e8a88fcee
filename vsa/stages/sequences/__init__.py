# SPDX-License-Identifier: Apache-2.0
"""Attention over a ``vsa.Sequence``: lowered once to what grids and padded tiles have. Not public.

Each function returns the same call over grids where there is one, for those who compute these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.stages.sequences import attend as stages
from vsa.stages.sequences.call import Given, GridCall, are_meant, as_grids, grids_of, resolve
from vsa.stages.sequences.choice import check_must, everything, pools_of
from vsa.values import checks
from vsa.values.precision import Precision
from vsa.values.score import Score, runs_of
from vsa.values.selection import Selection, check_is_selection

__all__ = [
    "Given",
    "GridCall",
    "are_meant",
    "attention",
    "block_sparse_attention",
    "branches",
    "grids_of",
    "recall",
    "refuse",
    "select",
]


def attention(
    given: Given,
    gate_coarse: Tensor | None,
    gate_fine: Tensor | None,
    score: Score,
    tail: bool,
    precision: Precision,
) -> tuple[Tensor, Selection, Tensor] | GridCall:
    """``vsa.attention``: out, the choice and lse."""
    if (same := as_grids(given)) is not None:
        return same
    refuse(score, tail, given.mask)
    gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
    mixed = resolve(given, gates, precision)
    q = mixed.call.q
    for name, gate in gates.items():
        checks.gate(name, gate, q)
    pools, selection = None, given.selection
    if selection is None:
        pools = pools_of(mixed.kv_sequence, given.topk, q.shape[2])
    else:
        selection = selection.savable()
    with torch.autocast(q.device.type, enabled=False):
        branch = stages.prepare(mixed, pools, selection, gate_coarse is not None)
        out, lse = stages.attend(mixed, branch, gate_coarse, gate_fine)
    return out, branch.selection, lse


def branches(given: Given) -> tuple[Tensor, Tensor]:
    """The fine and the coarse output of ``attention`` apart, for those who gate them later.

    Args:
        given: q, k, v, topk, the grid and the scale; the rest is None.

    Returns:
        out: like q.
        coarse: (B, heads, tiles of all segments in the order of the sequence, head_dim), fp32 or
            wider; zeros for segments that take no part in the coarse stage.
    """
    mixed = resolve(given)
    pools = pools_of(mixed.kv_sequence, given.topk, mixed.call.q.shape[2])
    with torch.autocast(mixed.call.q.device.type, enabled=False):
        branch = stages.prepare(mixed, pools, None, with_coarse=True)
        out, _ = stages.fine_stage(mixed, branch.selection)
        return out, stages.coarse_rows(mixed, branch)


def block_sparse_attention(
    given: Given, tail: bool, precision: Precision
) -> tuple[Tensor, Tensor] | GridCall:
    """``vsa.block_sparse_attention``: out and lse."""
    check_is_selection(given.selection)
    if (same := as_grids(given)) is not None:
        return same
    refuse("mean", tail, given.mask)
    mixed = resolve(given, precision=precision)
    assert given.selection is not None
    with torch.autocast(mixed.call.q.device.type, enabled=False):
        return stages.fine_stage(mixed, given.selection.savable())


def select(given: Given, must: object, score: Score) -> Selection | GridCall:
    """``vsa.select``."""
    if (same := as_grids(given)) is not None:
        return same
    refuse(score, False, given.mask)
    mixed = resolve(given)
    forced = check_must(must, mixed)
    pools = pools_of(mixed.kv_sequence, given.topk, mixed.call.q.shape[2])
    with torch.no_grad(), torch.autocast(mixed.call.q.device.type, enabled=False):
        return stages.prepare(mixed, pools, None, False, forced).selection


def recall(given: Given) -> Tensor | GridCall:
    """``Selection.recall``: (B, heads)."""
    check_is_selection(given.selection)
    if (same := as_grids(given)) is not None:
        return same
    refuse("mean", False, given.mask)
    mixed = resolve(given)
    assert given.selection is not None
    with torch.no_grad(), torch.autocast(mixed.call.q.device.type, enabled=False):
        dense = stages.sparse_lse(mixed, everything(mixed))
        kept = (stages.sparse_lse(mixed, given.selection) - dense).exp()
        real = dense > float("-inf")  # invalid tokens ask nothing
        return torch.where(real, kept, 0).sum(-1) / real.sum(-1)


def refuse(score: Score, tail: bool, mask: object) -> None:
    """What needs the one video that sequences may be without."""
    if runs_of(score) > 1:
        raise ValueError(
            f"score must be 'mean' for this grid, but it is {score!r}: a vsa.Sequence has another "
            "where one video alone competes and is sparse, and the rest has no part in the coarse "
            "stage"
        )
    if checks.flag("tail", tail):
        raise ValueError(
            "tail must be False for this grid, but it is True: a vsa.Sequence has a tail where "
            "one video alone competes and is sparse, and the rest has no part in the coarse stage"
        )
    if mask is not None:
        raise ValueError(
            f"mask must be None for this grid, but it is of type {type(mask).__name__}: a "
            "vsa.Sequence has one where one video alone competes and is sparse, and nothing else "
            "is in the coarse stage"
        )
