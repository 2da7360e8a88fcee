# SPDX-License-Identifier: Apache-2.0
"""The watch that tests of bad input stand on: it sees work of any kind, and whole names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from python.no_work import NoWork, is_named

import vsa
from vsa.operators import coarse_select as ops

Q = torch.randn(1, 4, 4, 8, 2, 16)
FLAT = Q.flatten(1, 3)
GRID = vsa.Grid((4, 4, 8))
MEANS = torch.randn(1, 2, 2, 16)
SCORES = (MEANS, MEANS, None, [1], 0.0, None, 1.0, "torch", [], None, [])
OPERATORS = [
    partial(ops.tile_means, [FLAT], GRID.as_ints(), "torch"),
    partial(ops.select_tiles, *SCORES),
    partial(ops.select_and_attend, *SCORES, MEANS),
    partial(ops.coarse_attention, MEANS, MEANS, MEANS, 1.0, "torch"),
    partial(vsa.block_sparse_attention, FLAT, FLAT, FLAT, vsa.select(Q, Q, 1), grid=GRID),
    partial(torch.add, Q, Q),
    partial(torch.clone, Q),
    partial(torch.empty, 3),
]


@pytest.mark.parametrize("work", OPERATORS)
def test_the_watch_sees_operators_and_kernels(work: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="ran before the input was checked"), NoWork():
        work()


@pytest.mark.parametrize(
    ("name", "sentence", "named"),
    [
        ("k", "k must have the batch of q", True),
        ("k", "backend 'flex' lacks a k", False),
        ("v", "k must have the shape of v", False),
        ("k", "pass kv_grid: k has 3 tokens", True),
        ("must", "topk must be positive", False),
        ("topk", "topk[1] must be positive", False),
        ("topk[1]", "topk[1] must be positive", True),
        ("grid", "kv_grid is (1, 2, 3)", False),
        ("grid", "q has 3 tokens, but grid has 4", True),
    ],
)
def test_whole_words_count_as_names(name: str, sentence: str, named: bool) -> None:
    assert is_named(name, sentence) == named
