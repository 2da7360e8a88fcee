# SPDX-License-Identifier: Apache-2.0
"""Tile means and the choice of tiles by the project's own kernels.

Nothing here waits for the device or reads from it: calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends.kernels.calls import means_call
from vsa.backends.kernels.coarse_calls import (
    Choice,
    attention_calls,
    choice_calls,
    product,
    products_call,
    score_numbers,
    select_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.masked_calls import clean, located
from vsa.backends.kernels.tensors import as_matrices, dtype_name, one_per_tile
from vsa.backends.torch_coarse import SCORE_BYTES
from vsa.values import bitmap, padded
from vsa.values.grid import Grid
from vsa.values.problem import TileScores
from vsa.values.tile_mask import TileMask


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


def tile_means(
    machine: Machine,
    xs: Sequence[Tensor],
    grids: Sequence[Grid],
    sizes: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Means of up to three tensors, bf16, fp16 or fp32, that ``can_mean`` accepts.

    Args:
        machine: what runs the kernel.
        xs: (B, length, heads, head_dim) each.
        grids: their grids.
        sizes: of padded tiles, contiguous int32, the real tokens.

    Returns:
        (B, heads, num_tiles, head_dim) fp32 each.
    """
    means = [
        torch.empty(
            x.shape[0], x.shape[2], grid.num_tiles, x.shape[3], dtype=torch.float32, device=x.device
        )
        for x, grid in zip(xs, grids, strict=True)
    ]
    call = means_call(xs, grids, means, sizes)
    machine.run(call, xs[0].device)
    return means


def padded_tile_means(
    machine: Machine, xs: Sequence[Tensor], sizes: Sequence[Tensor]
) -> list[Tensor]:
    """``tile_means`` of padded tiles.

    Args:
        machine: what runs the kernel.
        xs: (B, 64 * n, heads, head_dim) each.
        sizes: (n,) int32 of each, real tokens of its tiles.
    """
    grids = [padded.grid_of(len(of)) for of in sizes]
    return tile_means(machine, xs, grids, [one_per_tile("sizes", of) for of in sizes])


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
    mask = scores.mask
    q_means, k_means = clean(mask, scores.q_means, scores.k_means)
    if v_means is not None:
        v_means = clean(mask, q_means, v_means)[1]
    batch, heads, tiles, _ = q_means.shape
    matrices, columns = k_means.shape[0] * k_means.shape[1], k_means.shape[2]
    words = q_means.new_empty(batch * heads * tiles, bitmap.num_words(columns), dtype=torch.int32)
    forced = None if scores.must is None else bitmap.pack(scores.must)
    # One tensor of scores for all slices.
    numbers = score_numbers(matrices, batch * heads * tiles // matrices, columns, SCORE_BYTES)
    memory = q_means.new_empty(numbers)
    coarse = None
    if v_means is not None:
        coarse = q_means.new_empty(batch, heads, tiles, v_means.shape[-1])
    q, k, v, out = (
        None if x is None else as_matrices(x, matrices) for x in (q_means, k_means, v_means, coarse)
    )
    assert q is not None and k is not None
    asked = Choice(
        q, k, v, scores.scale, forced, scores.topk, scores.mass, tiles,
        located(mask, tiles), scores.shares,
    )  # fmt: skip
    for call in choice_calls(asked, memory, words, out, SCORE_BYTES):
        machine.run(call, q_means.device)
    return words.view(batch, heads, tiles, -1), coarse


def attend(
    machine: Machine,
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    scale: float,
    mask: TileMask | None = None,
) -> Tensor:
    """The coarse attention as in ``Backend.coarse_attention``, of fp32 means."""
    q_means, k_means, v_means = clean(mask, q_means, k_means, v_means)
    tiles = q_means.shape[2]
    matrices, columns = k_means.shape[0] * k_means.shape[1], k_means.shape[2]
    coarse = torch.empty_like(q_means, memory_format=torch.contiguous_format)
    *means, out = (as_matrices(x, matrices) for x in (q_means, k_means, v_means, coarse))
    numbers = score_numbers(matrices, means[0].shape[1], columns, SCORE_BYTES)
    memory = q_means.new_empty(numbers)
    for call in attention_calls(means, scale, memory, out, SCORE_BYTES, located(mask, tiles)):
        machine.run(call, q_means.device)
    return coarse


def multiply(machine: Machine, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``torch_coarse.product`` of fp32 matrices on tensor cores, as exact as in fp32.

    Where a value is infinite the result is NaN, infinite products included.
    """
    out = left.new_empty(*left.shape[:2], right.shape[1])
    machine.run(products_call(product(left, right, out, scale)), left.device)
    return out


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
