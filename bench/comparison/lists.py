# SPDX-License-Identifier: Apache-2.0
"""A sparsity pattern in the forms that kernels of others take."""

from __future__ import annotations

import torch
from torch import Tensor

from comparison.archives import Unavailable
from comparison.problem import Problem
from vsa.values.grid import SLOTS


def ascending_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (B, heads, rows, columns) as lists.

    Returns:
        columns of every row, (B, heads, rows, longest) int32, ascending, zeros behind the last;
        how many there are, (B, heads, rows) int32.
    """
    count = mask.sum(-1, dtype=torch.int32)
    longest = int(count.max())
    columns = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
    behind = torch.arange(longest, device=mask.device) >= count[..., None]
    return columns.masked_fill(behind, 0).int().contiguous(), count.contiguous()


def key_intervals(mask: Tensor, sizes: Tensor) -> Tensor:
    """A mask of tiles as intervals of keys, tiles of 64 slots one behind the other.

    Neighbouring tiles make one interval, unless the first of them has empty slots at its end.

    Args:
        mask: (heads, query tiles, key tiles), which key tiles a query tile attends.
        sizes: tokens of each key tile, (key tiles,).

    Returns:
        for every query slot the ends of its intervals, (heads, 2 * most + 1, query tiles * 64)
        int32: keys [0, f0), [f1, f2), [f3, f4) and so on. f0 is 0, and intervals behind the last
        are empty.
    """
    whole = sizes == SLOTS
    begins, ends = mask.clone(), mask.clone()
    begins[..., 1:] &= ~(mask[..., :-1] & whole[:-1])
    ends[..., :-1] &= ~(mask[..., 1:] & whole[:-1])
    (first, count), (last, _) = ascending_lists(begins[None]), ascending_lists(ends[None])
    most, slots = first.shape[-1], mask.shape[-1] * SLOTS
    behind = (torch.arange(most, device=mask.device) >= count[..., None])[0]
    bounds = torch.zeros(
        mask.shape[0], 2 * most + 1, mask.shape[1], dtype=torch.int32, device=mask.device
    )
    bounds[:, 1::2] = (first[0] * SLOTS).masked_fill(behind, slots).mT
    bounds[:, 2::2] = (last[0] * SLOTS + sizes[last[0].long()]).masked_fill(behind, slots).mT
    return bounds.repeat_interleave(SLOTS, -1)


def in_pairs(mask: Tensor) -> Tensor:
    """A mask with as many columns in a row, one more where they are odd, in whole pairs.

    A row keeps the pairs (2j, 2j + 1) of which it had most, the first of equal ones.

    Args:
        mask: (B, heads, rows, columns), an even number of columns.
    """
    had = mask.unflatten(-1, (-1, 2)).sum(-1)
    order = had.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(had.shape[-1], device=mask.device).expand_as(order)
    )
    return (rank < (mask.sum(-1, keepdim=True) + 1) // 2).repeat_interleave(2, -1)


def whole_tiles(problem: Problem) -> None:
    """Refuse a grid that has clipped tiles.

    Raises:
        Unavailable: where it has.
    """
    if not bool((problem.tile_sizes == SLOTS).all()):
        raise Unavailable("it needs whole tiles, but some are clipped on this grid")


def head_dim_128(problem: Problem) -> None:
    """Refuse another head_dim than 128.

    Raises:
        Unavailable: where it is another.
    """
    if problem.case.head_dim != 128:
        raise Unavailable(f"it needs head_dim 128, but it is {problem.case.head_dim}")
