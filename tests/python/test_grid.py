# SPDX-License-Identifier: Apache-2.0
"""grid: tiles, sizes, round trips, the best tile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.facts_library import Facts

import vsa
from vsa.stages.coarse import tile_means
from vsa.verify import reference

EXTENTS = st.tuples(*[st.integers(1, 11)] * 3)
TILES = st.tuples(*[st.integers(1, 8)] * 3).filter(lambda tile: math.prod(tile) <= 64)


@given(shape=EXTENTS, tile=TILES, prefix=st.integers(0, 3), suffix=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_grid_is_the_reference_enumeration(
    shape: tuple, tile: tuple, prefix: int, suffix: int
) -> None:
    grid = vsa.Grid(shape, tile=tile, prefix=prefix, suffix=suffix)
    tiles = reference.tiles_of(shape, tile, 0)
    assert grid.num_tiles == math.prod(grid.tiles) == len(tiles)
    assert grid.sizes.tolist() == [len(tokens) for tokens in tiles]
    assert grid.tokens == math.prod(shape) and grid.length == prefix + grid.tokens + suffix
    assert grid.waste == pytest.approx(1 - grid.tokens / (64 * len(tiles)))
    listed = [[token for token in row if token >= 0] for row in grid.tokens_of_tiles().tolist()]
    assert listed == tiles
    tile_of = {token: i for i, tokens in enumerate(tiles) for token in tokens}
    assert grid.tile_of_token().tolist() == [tile_of[token] for token in range(grid.tokens)]
    assert grid.is_ragged == (len(set(grid.sizes.tolist())) > 1)
    x = torch.randn(2, grid.length, 3)
    means = tile_means([x[:, :, None]], [grid], "torch")[0][:, 0]
    expected = torch.stack(
        [x[:, [prefix + token for token in tokens]].mean(1) for tokens in tiles], 1
    )
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


@given(shape=EXTENTS, tile=TILES, text=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_to_tiles_and_back(shape: tuple, tile: tuple, text: int) -> None:
    grid = vsa.Grid(shape, tile=tile, prefix=text, suffix=2 * text)
    x = torch.randn(2, grid.length, 2, 3)
    tiles = grid.to_tiles(x)
    assert tiles.shape == (2, grid.num_tiles, 64, 2, 3)
    for i, tokens in enumerate(reference.tiles_of(shape, tile, text)):
        filled = tiles[:, i].abs().sum((0, -1, -2)) > 0
        assert filled.sum() == len(tokens)
        torch.testing.assert_close(tiles[:, i, filled], x[:, tokens])
    video = slice(text, text + grid.tokens)
    back = grid.from_tiles(tiles)
    assert torch.equal(back[:, video], x[:, video])
    assert back[:, :text].abs().sum() == 0 and back[:, video.stop :].abs().sum() == 0


@given(shape=st.tuples(*[st.integers(1, 90)] * 3))
@settings(max_examples=150, deadline=None)
def test_best_tile_never_wastes_more_than_a_cube(shape: tuple) -> None:
    tile = vsa.best_tile(shape)
    assert math.prod(tile) <= 64
    assert vsa.Grid(shape, tile=tile).waste <= vsa.Grid(shape, tile=(4, 4, 4)).waste
    assert vsa.Grid(shape, tile="auto").tile == tile


def test_best_tile_of_known_videos() -> None:
    assert vsa.best_tile((21, 30, 52)) == (3, 5, 4)
    assert vsa.best_tile((16, 28, 52)) == (4, 4, 4)
    assert vsa.best_tile((1, 64, 64)) == (1, 8, 8)
    assert vsa.best_tile((1, 1, 640)) == (1, 1, 64)
    wan = vsa.Grid((21, 30, 52), tile="auto")
    assert wan.num_tiles == 546 and vsa.Grid((21, 30, 52)).num_tiles == 624


def test_grids_compare_by_value() -> None:
    assert vsa.Grid((4, 4, 4)) == vsa.Grid([4, 4, 4], tile=[4, 4, 4])
    assert vsa.Grid((4, 4, 4), prefix=1) != vsa.Grid((4, 4, 4))
    assert vsa.Grid.from_ints(vsa.Grid((5, 6, 7), (1, 2, 3), 4, 5).as_ints()) == vsa.Grid(
        (5, 6, 7), (1, 2, 3), 4, 5
    )


@given(shape=EXTENTS, tile=TILES, prefix=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_compiled_part_cuts_alike(facts: Facts, shape: tuple, tile: tuple, prefix: int) -> None:
    grid = vsa.Grid(shape, tile=tile, prefix=prefix)
    _, masks, rows = facts.tile_table(grid.as_ints())
    assert [mask.bit_count() for mask in masks] == grid.sizes.tolist()
    ours = [
        [prefix + token for token in row if token >= 0] for row in grid.tokens_of_tiles().tolist()
    ]
    assert [[token for token in row if token >= 0] for row in rows] == ours
