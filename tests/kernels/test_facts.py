# SPDX-License-Identifier: Apache-2.0
"""csrc/prim/facts.h against the definitions written out token by token."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.facts_library import Facts, load, sizes


@st.composite
def grids(draw):
    video = draw(st.tuples(*[st.integers(1, 9)] * 3))
    tile = draw(
        st.sampled_from([(1, 1, 1), (4, 4, 4), (3, 5, 4), (1, 8, 8), (2, 2, 4), (1, 1, 64)])
        | st.tuples(*[st.integers(1, 4)] * 3)
    )
    return (*video, *tile, draw(st.integers(0, 5)), draw(st.integers(0, 5)))


@st.composite
def bitmaps(draw):
    """(rows, columns, set of (row, column)), with sizes around the 32 bits of a word."""
    size = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 100])
    rows, columns = draw(size), draw(size)
    rng = random.Random(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    cells = itertools.product(range(rows), range(columns))
    return rows, columns, {cell for cell in cells if rng.random() < density}


def tiles_by_definition(grid):
    """Per tile, t slowest, w fastest: its first (t, h, w), the axes that clip it, its 64 tokens."""
    video, tile, prefix = grid[:3], grid[3:6], grid[6]
    raster = {
        at: prefix + n for n, at in enumerate(itertools.product(*(range(size) for size in video)))
    }
    for first in itertools.product(*(range(0, video[a], tile[a]) for a in range(3))):
        clipped = [first[a] + tile[a] > video[a] for a in range(3)]
        offsets = itertools.product(*(range(size) for size in tile))
        tokens = [raster.get(tuple(map(sum, zip(first, at, strict=True))), -1) for at in offsets]
        yield first, clipped, tokens + [-1] * (64 - len(tokens))


def pack(indices, bits):
    number = sum(1 << index for index in indices)
    return [number >> start & 0xFFFFFFFF for start in range(0, bits, 32)]


@settings(deadline=None)
@given(grids())
def test_tiles_have_places_masks_and_tokens_by_definition(facts: Facts, grid):
    places, masks, tokens = facts.tile_table(grid)
    expected = list(tiles_by_definition(grid))
    assert len(places) == len(masks) == len(tokens) == len(expected)
    for place, mask, row_tokens, (first, clipped, by_row) in zip(
        places, masks, tokens, expected, strict=True
    ):
        assert place == (*first, sum(bit << axis for axis, bit in enumerate(clipped)))
        assert row_tokens == by_row
        assert mask == sum(1 << row for row, token in enumerate(by_row) if token >= 0)


@settings(deadline=None)
@given(grids())
def test_every_token_finds_its_tile_and_row(facts: Facts, grid):
    home = {
        token: (tile, row)
        for tile, (_, _, by_row) in enumerate(tiles_by_definition(grid))
        for row, token in enumerate(by_row)
        if token >= 0
    }
    volume = grid[0] * grid[1] * grid[2]
    assert len(home) == volume
    for token in range(grid[6] + volume + grid[7]):
        assert facts.tile_and_row(grid, token) == home.get(token, (-1, -1))


def test_grid_has_at_most_eight_kinds_of_tile(facts: Facts):
    places, masks, _ = facts.tile_table((9, 9, 9, 4, 4, 4, 0, 0))
    by_clip = {}
    for (_, _, _, clip), mask in zip(places, masks, strict=True):
        assert by_clip.setdefault(clip, mask) == mask
    assert sorted(by_clip) == list(range(8))
    assert by_clip[0] == 2**64 - 1
    assert by_clip[7] == 1


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        ((0, 1, 1, 1, 1, 1, 0, 0), "must be positive"),
        ((1, 1, 1, 1, -4, 1, 0, 0), "must be positive"),
        ((9, 9, 9, 4, 4, 5, 0, 0), "at most 64 tokens"),
        ((9, 9, 9, 2**20, 2**20, 2**30, 0, 0), "at most 64 tokens"),
        ((2**20, 2**20, 2**30, 4, 4, 4, 0, 0), "more tokens than 31 bits"),
        ((9, 9, 9, 4, 4, 4, 2**31 - 1, 2**31 - 1), "more tokens than 31 bits"),
        ((9, 9, 9, 4, 4, 4, 0, -1), "must not be negative"),
    ],
)
def test_bad_grid_is_refused_with_a_sentence(grid, complaint):
    _C = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    with pytest.raises(ValueError, match=f"MeanTensor: grid: .*{complaint}"):
        _C.MeanTensor(tokens=(16, 1, 1, 1), grid=grid, sizes=0, heads=1, means=16)


@settings(deadline=None)
@given(
    st.integers(1, 200).flatmap(
        lambda bits: st.tuples(st.just(bits), st.sets(st.integers(0, bits - 1)))
    )
)
def test_bitmap_row_packs_counts_and_tests(facts: Facts, row):
    bits, indices = row
    words = facts.pack(sorted(indices), bits)
    assert words == pack(indices, bits)
    assert facts.count(words, bits) == len(indices)
    assert [bit for bit in range(bits) if facts.test(words, bit)] == sorted(indices)


@settings(deadline=None)
@given(st.sets(st.integers(0, 31)))
def test_ends_of_a_word_are_its_lowest_and_highest_bit(facts: Facts, indices):
    expected = (min(indices), max(indices)) if indices else (32, -1)
    assert facts.lowest_and_highest(sum(1 << index for index in indices)) == expected


@settings(deadline=None)
@given(bitmaps())
def test_bitmap_transposes(facts: Facts, bitmap):
    rows, columns, cells = bitmap
    by_row = [pack({c for r, c in cells if r == row}, columns) for row in range(rows)]
    by_column = [pack({r for r, c in cells if c == column}, rows) for column in range(columns)]
    transposed = facts.transpose(list(itertools.chain(*by_row)), rows, columns)
    assert transposed == list(itertools.chain(*by_column))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "grid", [(21, 30, 52, 4, 4, 4, 226, 7), (9, 9, 9, 3, 5, 4, 0, 0), (1, 1, 130, 1, 1, 64, 0, 1)]
)
def test_device_and_host_agree_on_every_tile(facts: Facts, grid, tmp_path):
    if not torch.cuda.is_available() or (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs a CUDA device and nvcc")
    flags = ["-std=c++20", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    library = load([nvcc, *flags], "facts.cu", tmp_path)
    places, masks, tokens = facts.tile_table(grid)
    n = len(places)
    on_device = [
        torch.full((n, 4), -7, dtype=torch.int32, device="cuda"),
        torch.full((n,), -7, dtype=torch.int64, device="cuda"),
        torch.full((n, 64), -7, dtype=torch.int32, device="cuda"),
    ]
    torch.cuda.synchronize()
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in on_device)
    assert library.device_tile_table(sizes(grid), n, *addresses) == 0
    assert [tuple(place) for place in on_device[0].tolist()] == places
    assert [mask % 2**64 for mask in on_device[1].tolist()] == masks
    assert on_device[2].tolist() == tokens
