# SPDX-License-Identifier: Apache-2.0
"""csrc/prim/facts.h, through vsa._C, against the definitions written out token by token."""

from __future__ import annotations

import importlib.resources
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

try:
    from vsa import _C
except ImportError as error:
    record = importlib.resources.files("vsa") / "_build.json"
    if record.is_file() and not (build := json.loads(record.read_text()))["compiled"]:
        pytest.skip(f"vsa was built without its compiled part: {build['why']}", True)
    raise RuntimeError(
        "vsa._C is missing although nothing says that vsa was built without it: install the "
        "package (pip install .), and run `pytest` rather than `python -m pytest`"
    ) from error


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


@given(grids())
def test_tiles_have_places_masks_and_tokens_by_definition(grid):
    places, masks, tokens = _C.tile_table(grid)
    expected = list(tiles_by_definition(grid))
    assert len(places) == len(masks) == len(tokens) == len(expected)
    for place, mask, row_tokens, (first, clipped, by_row) in zip(
        places, masks, tokens, expected, strict=True
    ):
        assert place == (*first, sum(bit << axis for axis, bit in enumerate(clipped)))
        assert row_tokens == by_row
        assert mask == sum(1 << row for row, token in enumerate(by_row) if token >= 0)


@given(grids())
def test_every_token_finds_its_tile_and_row(grid):
    home = {
        token: (tile, row)
        for tile, (_, _, by_row) in enumerate(tiles_by_definition(grid))
        for row, token in enumerate(by_row)
        if token >= 0
    }
    volume = grid[0] * grid[1] * grid[2]
    assert len(home) == volume
    for token in range(grid[6] + volume + grid[7]):
        assert _C.tile_and_row(grid, token) == home.get(token, (-1, -1))


def test_grid_has_at_most_eight_kinds_of_tile():
    places, masks, _ = _C.tile_table((9, 9, 9, 4, 4, 4, 0, 0))
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
    with pytest.raises(ValueError, match=complaint):
        _C.tile_table(grid)


@given(
    st.integers(1, 200).flatmap(
        lambda bits: st.tuples(st.just(bits), st.sets(st.integers(0, bits - 1)))
    )
)
def test_bitmap_row_packs_counts_tests_and_walks(row):
    bits, indices = row
    words = _C.pack_bits(sorted(indices), bits)
    assert words == pack(indices, bits)
    assert _C.count_bits(words, bits) == len(indices)
    assert [bit for bit in range(bits) if _C.test_bit(words, bits, bit)] == sorted(indices)
    assert _C.unpack_bits(words, bits) == sorted(indices)


@given(st.integers(1, 100), st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))
def test_bitmap_union_and_intersection(bits, a, b):
    a, b = ({index for index in indices if index < bits} for indices in (a, b))
    assert _C.unite_bits(pack(a, bits), pack(b, bits), bits) == pack(a | b, bits)
    assert _C.intersect_bits(pack(a, bits), pack(b, bits), bits) == pack(a & b, bits)


@given(bitmaps())
def test_bitmap_transposes(bitmap):
    rows, columns, cells = bitmap
    by_row = [pack({c for r, c in cells if r == row}, columns) for row in range(rows)]
    by_column = [pack({r for r, c in cells if c == column}, rows) for column in range(columns)]
    transposed = _C.transpose_bits(list(itertools.chain(*by_row)), rows, columns)
    assert transposed == list(itertools.chain(*by_column))


def test_bitmap_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="expected 4 words of 32 bits, got 3"):
        _C.transpose_bits([0, 0, 0], 2, 33)


def test_device_table_without_cuda_says_what_is_missing():
    if _C.build_info()["cuda"]:
        pytest.skip("this build has a CUDA part")
    with pytest.raises(RuntimeError, match="has no CUDA part"):
        _C.device_tile_table((1, 1, 1, 1, 1, 1, 0, 0), 0, 0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "grid", [(21, 30, 52, 4, 4, 4, 226, 7), (9, 9, 9, 3, 5, 4, 0, 0), (1, 1, 130, 1, 1, 64, 0, 1)]
)
def test_device_and_host_agree_on_every_tile(grid):
    count, reason = _C.device_count()
    if count == 0:
        pytest.skip(reason)
    import torch

    places, masks, tokens = _C.tile_table(grid)
    n = len(places)
    on_device = [
        torch.full((n, 4), -7, dtype=torch.int32, device="cuda"),
        torch.full((n,), -7, dtype=torch.int64, device="cuda"),
        torch.full((n, 64), -7, dtype=torch.int32, device="cuda"),
    ]
    stream = torch.cuda.current_stream().cuda_stream
    _C.device_tile_table(grid, *(x.data_ptr() for x in on_device), stream)
    assert [tuple(place) for place in on_device[0].tolist()] == places
    assert [mask % 2**64 for mask in on_device[1].tolist()] == masks
    assert on_device[2].tolist() == tokens
