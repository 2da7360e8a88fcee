# SPDX-License-Identifier: Apache-2.0
"""Tile means and the choice of tiles by the project's own kernels.

Nothing here waits for the device or reads from it: calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vsa.backends.kernels.calls import means_call, select_call, split_call
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import dtype_name
from vsa.backends.torch_coarse import SCORE_BYTES, CoarseOutput, score_slices
from vsa.values import bitmap
from vsa.values.grid import Grid
from vsa.values.problem import TileScores


def can_mean(xs: Sequence[Tensor]) -> bool:
    """Whether one launch means all of these, (B, length, heads, head_dim) each."""
    from vsa import _C

    first = xs[0]
    return dtype_name(first) in _C.MEAN_ELEMENTS and all(
        x.dtype == first.dtype
        and x.device == first.device
        and (x.shape[0], x.shape[-1]) == (first.shape[0], first.shape[-1])
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        for x in xs
    )


def tile_means(machine: Machine, xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Means of up to three tensors, bf16, fp16 or fp32, that ``can_mean`` accepts.

    Args:
        machine: what runs the kernel.
        xs: (B, length, heads, head_dim) each.
        grids: their grids.

    Returns:
        (B, heads, num_tiles, head_dim) fp32 each.
    """
    means = [
        torch.empty(
            x.shape[0], x.shape[2], grid.num_tiles, x.shape[3], dtype=torch.float32, device=x.device
        )
        for x, grid in zip(xs, grids, strict=True)
    ]
    call = means_call(xs, grids, means)
    machine.run(call, xs[0].device)
    return means


def can_select(scores: TileScores) -> bool:
    """Whether the kernel takes scores of this type and as many budgets."""
    from vsa import _C

    return scores.q_means.dtype == torch.float32 and len(scores.topk) <= _C.MOST_HEAD_BUDGETS


def select(
    machine: Machine, scores: TileScores, v_means: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Results as in ``vsa.backends.base.Backend.select``, fp32 means.

    With v_means, scores become the coarse attention's weights where they lie.
    """
    q_means, k_means = scores.q_means, scores.k_means
    batch, heads, tiles, _ = q_means.shape
    words = torch.empty(
        batch * heads * tiles,
        bitmap.num_words(k_means.shape[2]),
        dtype=torch.int32,
        device=q_means.device,
    )
    forced = None if scores.must is None else bitmap.pack(scores.must)
    coarse = CoarseOutput(q_means, v_means)
    multiply = partial(split_product, machine)
    for part in score_slices(q_means, k_means, scores.scale, SCORE_BYTES, multiply):
        rows = part.scores.flatten(0, 1)
        weights = None if v_means is None else rows
        select_rows(
            machine,
            rows,
            forced,
            scores.topk,
            scores.mass,
            tiles,
            part.first,
            words[part.first :],
            weights,
        )
        if v_means is not None:
            coarse.add(part, part.scores)
        del part, rows, weights
    return words.view(batch, heads, tiles, -1), coarse.rows


def split_product(machine: Machine, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``torch_coarse.product`` of fp32 matrices on tensor cores, as exact as in fp32.

    Where a value is infinite the result is NaN, infinite products included.
    """
    from vsa import _C

    left, right = left.contiguous(), right.contiguous()
    pieces = [
        torch.empty(
            *x.shape[:2], _C.SPLIT_PIECES * x.shape[2], dtype=torch.bfloat16, device=x.device
        )
        for x in (left, right)
    ]
    call = split_call(left, right, pieces, scale)
    machine.run(call, left.device)
    return machine.product(pieces[0], pieces[1])


def select_rows(
    machine: Machine,
    scores: Tensor,
    forced: Tensor | None,
    counts: Sequence[int],
    mass: float,
    tiles: int,
    first: int,
    words: Tensor,
    weights: Tensor | None = None,
) -> None:
    """The tiles that rows of scores keep, and the softmax of each row.

    Args:
        machine: what runs the kernel.
        scores: (rows, n_k) fp32, contiguous.
        forced: (n_q, words) int32, tiles always kept, or None.
        counts: least tiles of a row, one number or one per head.
        mass: least share of a row's softmax.
        tiles: n_q.
        first: number of the first row among those of (B, heads, n_q).
        words: (rows or more, words) int32, contiguous; the bitmap is written here.
        weights: like scores, and maybe the same; the softmax is written here. None for none.
    """
    call = select_call(scores, forced, counts, mass, tiles, first, words, weights)
    machine.run(call, scores.device)
