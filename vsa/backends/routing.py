# SPDX-License-Identifier: Apache-2.0
"""Means and selection by the project's own kernels: on a Hopper GPU, or their source on a CPU.

Nothing here waits for the device or reads from it: calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vsa.backends import BACKENDS, Request, kernels
from vsa.backends.pytorch_routing import SCORE_BYTES, CoarseOutput, score_slices
from vsa.values import bitmap
from vsa.values.grid import Grid


def run_on(device: torch.device) -> bool:
    """Whether this device is a GPU that the kernels were built for."""
    return device.type == "cuda" and _run_on_gpu(device.index)


@cache
def _run_on_gpu(index: int) -> bool:
    return BACKENDS["hopper"].why_not(Request("cuda", index)) is None


def can_mean(xs: Sequence[Tensor]) -> bool:
    """Whether one launch means all of these, (B, length, heads, head_dim) each."""
    from vsa import _C

    first = xs[0]
    return kernels.dtype_name(first) in _C.MEAN_ELEMENTS and all(
        x.dtype == first.dtype
        and x.device == first.device
        and (x.shape[0], x.shape[-1]) == (first.shape[0], first.shape[-1])
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        for x in xs
    )


def tile_means(xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Means of up to three tensors, bf16, fp16 or fp32, that ``can_mean`` accepts.

    Args:
        xs: (B, length, heads, head_dim) each.
        grids: their grids.

    Returns:
        (B, heads, num_tiles, head_dim) fp32 each.
    """
    from vsa import _C

    means = [
        torch.empty(
            x.shape[0], x.shape[2], grid.num_tiles, x.shape[3], dtype=torch.float32, device=x.device
        )
        for x, grid in zip(xs, grids, strict=True)
    ]
    call = _C.TileMeans(
        tensors=[
            _C.MeanTensor(
                tokens=kernels.view(x),
                grid=grid.as_ints(),
                heads=x.shape[2],
                means=mean.data_ptr(),
            )
            for x, grid, mean in zip(xs, grids, means, strict=True)
        ],
        batch=xs[0].shape[0],
        head_dim=xs[0].shape[3],
        dtype=kernels.dtype_name(xs[0]),
    )
    kernels.run(call, xs[0].device)
    return means


def can_select(means: Tensor, counts: Sequence[int]) -> bool:
    """Whether the kernel takes scores of this type and as many budgets."""
    from vsa import _C

    return means.dtype == torch.float32 and len(counts) <= _C.MOST_HEAD_BUDGETS


def select(
    q_means: Tensor,
    k_means: Tensor,
    must: Tensor | None,
    counts: Sequence[int],
    scale: float,
    mass: float,
    v_means: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in ``vsa.ops.select_and_attend``, fp32 means.

    Without v_means there is no second result. With them, scores become the coarse attention's
    weights where they lie.
    """
    batch, heads, tiles, _ = q_means.shape
    words = torch.empty(
        batch * heads * tiles,
        bitmap.num_words(k_means.shape[2]),
        dtype=torch.int32,
        device=q_means.device,
    )
    forced = None if must is None else bitmap.pack(must)
    coarse = CoarseOutput(q_means, v_means)
    for part in score_slices(q_means, k_means, scale, SCORE_BYTES, split_product):
        rows = part.scores.flatten(0, 1)
        weights = None if v_means is None else rows
        select_rows(rows, forced, counts, mass, tiles, part.first, words[part.first :], weights)
        if v_means is not None:
            coarse.add(part, part.scores)
        del part, rows, weights
    return words.view(batch, heads, tiles, -1), coarse.rows


def split_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``pytorch_routing.product`` of fp32 matrices on tensor cores, as exact as in fp32.

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
    call = _C.SplitOperands(
        left=left.data_ptr(),
        right=right.data_ptr(),
        left_pieces=pieces[0].data_ptr(),
        right_pieces=pieces[1].data_ptr(),
        left_rows=left.shape[0] * left.shape[1],
        right_rows=right.shape[0] * right.shape[1],
        depth=left.shape[2],
        scale=scale,
    )
    kernels.run(call, left.device)
    if left.device.type == "cpu":  # which has no product of bf16 matrices in fp32
        return torch.bmm(pieces[0].float(), pieces[1].float().mT)
    return torch.bmm(pieces[0], pieces[1].mT, out_dtype=torch.float32)


def select_rows(
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
        scores: (rows, n_k) fp32, contiguous.
        forced: (n_q, words) int32, tiles always kept, or None.
        counts: least tiles of a row, one number or one per head.
        mass: least share of a row's softmax.
        tiles: n_q.
        first: number of the first row among those of (B, heads, n_q).
        words: (rows or more, words) int32, contiguous; the bitmap is written here.
        weights: like scores, and maybe the same; the softmax is written here. None for none.
    """
    from vsa import _C

    call = _C.SelectTiles(
        scores=scores.data_ptr(),
        must=0 if forced is None else forced.data_ptr(),
        bitmap=words.data_ptr(),
        weights=0 if weights is None else weights.data_ptr(),
        first_row=first,
        rows=len(scores),
        columns=scores.shape[1],
        query_tiles=tiles,
        counts=list(counts),
        mass=mass,
    )
    kernels.run(call, scores.device)
