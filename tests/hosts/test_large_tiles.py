# SPDX-License-Identifier: Apache-2.0
"""Tiles of 128 and 256 tokens in raster order, as vLLM-Omni's default and FastVideo's may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import reference
from hosts.wan_layers import error, tensors
from torch import Tensor

from vsa.integrations.hosts import large_tiles, raster

GRID = (5, 9, 18)
LENGTH = math.prod(GRID)


def right(x: list[Tensor], tile: tuple[int, int, int], topk: int, gated: bool) -> Tensor:
    tiles = reference.video_tiles(GRID, tile)
    return reference.attention(*x[:3], tiles, topk, x[3] if gated else None)


@pytest.mark.filterwarnings("ignore:topk is 1000")
@pytest.mark.parametrize(
    ("tile", "topk"),
    [((4, 8, 8), 1), ((4, 8, 8), 1000), ((4, 4, 8), 4), ((8, 4, 4), 4), ((2, 5, 7), 4)],
)
def test_means_and_choice_are_those_of_the_whole_tile(
    tile: tuple[int, int, int], topk: int
) -> None:
    x = tensors(LENGTH)
    for gated in (False, True):
        out = raster.attend(*x[:3], topk, grid=GRID, tile=tile, gate=x[3] if gated else None)
        assert error(out, right(x, tile, topk, gated)) < 1e-12


@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 4, 8), (4, 8, 8)])
@pytest.mark.parametrize("segments", [(70, 20, 64), (1,), (256, 300)])
def test_segments_before_the_video_have_tiles_of_their_own(
    tile: tuple[int, int, int], segments: tuple[int, ...]
) -> None:
    x = tensors(sum(segments) + LENGTH)
    tiles, before = reference.packed_tiles(
        segments, reference.video_tiles(GRID, tile), math.prod(tile)
    )
    for gate in (None, x[3]):
        out = raster.attend(*x[:3], 3, grid=GRID, tile=tile, gate=gate, segments=segments)
        wanted = reference.attention(*x[:3], tiles, 3, gate, before)
        assert error(out, wanted) < 1e-12


def test_gradients_reach_all_inputs() -> None:
    segments, tile = (70, 20), (4, 8, 8)
    x = [each.requires_grad_() for each in tensors(90 + LENGTH)]
    video = reference.video_tiles(GRID, tile)
    tiles, before = reference.packed_tiles(segments, video, 256)
    given: dict[str, Any] = dict(grid=GRID, tile=tile, gate=x[3], segments=segments)
    found = []
    for call in (
        lambda: large_tiles.attention(*x[:3], 3, **given),
        lambda: reference.attention(*x[:3], tiles, 3, x[3], before),
    ):
        call().square().sum().backward()
        found.append([each.grad for each in x])
        for each in x:
            each.grad = None
    assert max(error(a, b) for a, b in zip(*found, strict=True)) < 1e-10


def test_kernels_run_them_by_tiles_of_64() -> None:
    """In bf16, on the emulator: no further from fp64 than PyTorch's steps are, twice over."""
    x = [each.bfloat16() for each in tensors(LENGTH, heads=1)]
    x = [torch.cat([each] * 4, dim=-1) for each in x]  # head_dim 64, which kernels are built for
    wanted = right(x, (4, 8, 8), 3, True)
    call: dict[str, Any] = dict(grid=GRID, tile=(4, 8, 8), gate=x[3])
    ours, theirs = (
        error(large_tiles.attention(*x[:3], 3, **call, backend=backend), wanted)
        for backend in ("emulated", "torch")
    )
    assert ours < 2 * theirs


def test_one_graph_holds_a_call() -> None:
    x = [each.float() for each in tensors(LENGTH, heads=1)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return raster.attend(q, k, v, 3, grid=GRID, tile=(4, 8, 8), gate=gate)

    assert error(call(*x), right(x, (4, 8, 8), 3, True)) < 1e-5


def test_a_tile_is_cut_into_even_parts_or_refused() -> None:
    assert large_tiles.parts_of((4, 8, 8)) == (1, 2, 2)
    assert large_tiles.parts_of((4, 4, 8)) == (1, 1, 2)
    assert large_tiles.parts_of((4, 4, 4)) == (1, 1, 1)
    x = torch.zeros(1, LENGTH, 1, 16)
    with pytest.raises(ValueError, match=r"the host's tile must be .* but it is \(9, 9, 1\)"):
        large_tiles.attention(x, x, x, 1, grid=GRID, tile=(9, 9, 1))
    with pytest.raises(ValueError, match="gate must be broadcastable to q"):
        large_tiles.attention(x, x, x, 1, grid=GRID, tile=(4, 8, 8), gate=x[:, 1:])
    with pytest.raises(ValueError, match=r"query must be .* with S = 810, the tokens of dit_seq"):
        raster.attend(x[:, 1:], x, x, 1, grid=GRID, tile=(4, 8, 8), gate=None)
