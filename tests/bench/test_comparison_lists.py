# SPDX-License-Identifier: Apache-2.0
"""Patterns in the forms of other kernels, against loops in plain Python."""

from __future__ import annotations

import pytest
import torch

from comparison.archives import Unavailable
from comparison.lists import ascending_lists, head_dim_128, in_pairs, key_intervals, whole_tiles
from comparison.problem import Case, Problem

CPU = torch.device("cpu")


def drawn(*size: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    mask[..., 0, :] = False  # rows that keep nothing, all, the first and the last
    mask[..., 1, :] = True
    mask[..., 2, :] = torch.arange(size[-1]) == 0
    mask[..., 3, :] = torch.arange(size[-1]) == size[-1] - 1
    return mask


def test_lists_hold_the_columns_of_every_row() -> None:
    mask = drawn(2, 3, 7, 11)
    columns, count = ascending_lists(mask)
    assert columns.dtype == count.dtype == torch.int32 and columns.is_contiguous()
    for at in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        row, found = mask[tuple(at)].tolist(), columns[tuple(at)].tolist()
        wanted = [column for column, kept in enumerate(row) if kept]
        assert found == wanted + [0] * (11 - len(wanted)) and count[tuple(at)] == len(wanted)


@pytest.mark.parametrize("clipped", [False, True])
def test_intervals_hold_the_real_keys_of_the_tiles(clipped: bool) -> None:
    mask, sizes = drawn(2, 7, 9), torch.full((9,), 64, dtype=torch.int32)
    if clipped:
        sizes[[2, 3, 8]] = torch.tensor([12, 48, 1], dtype=torch.int32)
    bounds = key_intervals(mask, sizes)
    assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert bounds.shape[0] == 2 and bounds.shape[1] % 2 == 1 and bounds.shape[2] == 7 * 64
    for head in range(2):
        for slot in range(0, 7 * 64, 21):
            ends = bounds[head, :, slot].tolist()
            keys = list(range(ends[0]))
            for begin, end in zip(ends[1::2], ends[2::2], strict=True):
                keys += range(begin, end)
            wanted = [
                tile * 64 + place
                for tile in range(9)
                if mask[head, slot // 64, tile]
                for place in range(int(sizes[tile]))
            ]
            assert keys == wanted, (head, slot)


def test_neighbouring_whole_tiles_are_one_interval() -> None:
    mask = torch.tensor([[[1, 1, 1, 0, 1, 1]]]).bool()
    assert key_intervals(mask, torch.full((6,), 64))[0, :, 63].tolist() == [0, 0, 192, 256, 384]


def test_pairs_are_those_that_a_row_had_most_of() -> None:
    mask = drawn(1, 2, 9, 12)
    found = in_pairs(mask)
    for head in range(2):
        for row in range(9):
            had = mask[0, head, row].int().tolist()
            pairs = sorted(range(6), key=lambda j: (-had[2 * j] - had[2 * j + 1], j))
            kept = pairs[: (sum(had) + 1) // 2]
            wanted = [column // 2 in kept for column in range(12)]
            assert found[0, head, row].tolist() == wanted


def test_what_kernels_need_is_said_before_they_run() -> None:
    whole_tiles(Problem(Case((4, 8, 8), 1, 64, "random", 0.5), CPU))
    with pytest.raises(Unavailable, match="whole tiles"):
        whole_tiles(Problem(Case((4, 8, 9), 1, 64, "random", 0.5), CPU))
    with pytest.raises(Unavailable, match="head_dim 128, but it is 64"):
        head_dim_128(Problem(Case((4, 8, 8), 1, 64, "random", 0.5), CPU))
