# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/coarse/quantise_tiles.h by itself: every byte; mutants by what they get wrong."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "quantise_tiles.cpp"
STATISTICS = "kernels/coarse/channel_statistics.h"
TILES = "kernels/coarse/quantise_tiles.h"
SEEDS = 12
WRONG = "WRONG NUMBERS in "

IN_STATISTICS: MutantTable = {
    "InvalidTextCounts": (
        "if (tile.rows != 0) fn(tile);",
        "fn(tile);",
        WRONG + "(scales of )?values",
    ),
    "RowsOfTheOtherHalf": (
        "tokens_[1][lane] = token(lane + kWarpThreads);",
        "tokens_[1][lane] = token(lane);",
        WRONG,
    ),
    "GapsAreOtherTokens": (
        "keys.token(at, rows >> row & 1 ? row : first)",
        "keys.token(at, 0)",
        WRONG,
    ),
    "GapsAreNotZeros": (
        "pair = is_token(row) ? pair : 0;",
        "",
        WRONG + "(means|values)",
    ),
    "TextEntersTheMean": (
        "if (tile.at.region != Region::Video) return;",
        "",
        WRONG + "means",
    ),
    "RowsCountedAsIfAllWereTokens": (
        "count += popcount(tile.rows & kSampledRows);",
        "count += 4;",
        WRONG + "means",
    ),
    "InfinityEntersTheLargest": (
        "if (greatest_bits >= kInfinityBits) find_finite(here, p, tile);",
        "",
        WRONG + "scales of values",
    ),
    "NextToInfinityAllIsForgotten": (
        "larger(most[lane].bits[c], finite_magnitude(Tile::number(x, c)))",
        "0",
        WRONG + "scales of values",
    ),
    "NaNEntersTheMean": (
        "const bool kept = key >= -kMostInMean && key <= kMostInMean;",
        "const bool kept = true;",
        WRONG + "means",
    ),
    "LastTilesLeft": (
        "return ceil_div(p.keys.num_tiles(), p.together);",
        "return p.keys.num_tiles() / p.together;",
        WRONG + "(means|scales of values)",
    ),
    "RowsNotFolded": ("fold_rows(most);", "", WRONG + "scales of values"),
    "SumsNotFolded": ("fold_sums(sums);", "", WRONG + "means"),
}
IN_TILES: MutantTable = {
    "MeanNotSubtracted": (
        "(Tile::number(x, first + c) - means[lane].x[first + c]) * factor",
        "Tile::number(x, first + c) * factor",
        WRONG + "keys",
    ),
    "ScaleOfAllButTheMean": (
        "Tile::number(most, c) - means.x[c]",
        "Tile::number(most, c)",
        WRONG + "scales of keys",
    ),
    "MeanOfTheFirstChannels": (
        "of_head.of(Tile::channel(lane), c)",
        "of_head.of(0, c)",
        WRONG + "scales of keys",
    ),
    "FactorsOfTheFirstChannels": (
        "factors.of(channel, c)",
        "factors.of(0, c)",
        WRONG + "values",
    ),
    "ScaleOfALane": (
        "greatest([&](int lane) { return most[lane]; })",
        "most[0]",
        WRONG + "scales of keys",
    ),
    "NegativeKeysForgotten": (
        "bits = max3(bits, above, below);",
        "bits = max3(bits, above, above);",
        WRONG + "scales of keys",
    ),
    "NaNClamped": (
        "lane > 0 ? 0 : finite ? magnitude / kMost : float_of(kNanBits)",
        "lane > 0 ? 0 : magnitude / kMost",
        WRONG + "scales of keys",
    ),
    "KeysSwizzledAsValues": (
        "Keys::place(row, Tile::channel(lane))",
        "row * D + Tile::channel(lane)",
        WRONG + "keys",
    ),
    "HalfOfTheChannels": ("pack(0) | pack(4) << 32", "pack(0)", WRONG + "keys"),
    "ValuesInTheOrderOfKeys": (
        "tokens[i] = tile.token(key_at(place + i));",
        "tokens[i] = tile.token(place + i);",
        WRONG + "values",
    ),
    "SumsInTheOrderOfKeys": (
        "tile.is_token(key_at(place + i)) ? 1.f : 0.f",
        "tile.is_token(place + i) ? 1.f : 0.f",
        WRONG + "rows of sums",
    ),
    "InfiniteValuesClamped": (
        "return fma(value, 0, value);",
        "return value;",
        WRONG + "values",
    ),
    "AllRowsAreSums": (
        "row == 0 ? pack8<E4m3>(one(0), one(1), one(2), one(3)) : 0",
        "pack8<E4m3>(one(0), one(1), one(2), one(3))",
        WRONG + "rows of sums",
    ),
    "ScalesOfTheFirstHead": (
        "write_channels(p.channels + of_head * 2 * D, record);",
        "write_channels(p.channels, record);",
        WRONG + "(means|scales of values)",
    ),
}
TABLES = {STATISTICS: IN_STATISTICS, TILES: IN_TILES}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    tables = {header: {("tiles",): table} for header, table in TABLES.items()}
    includes = ("kernels/schedule/sequence.h", "prim/warp.h", "tile/quantised_tile.h")
    folder = tmp_path_factory.mktemp("quantise_tiles")
    return Planted(compiler, PROGRAM, folder, tuple(TABLES), tables, ("tiles",), SEEDS, *includes)


def test_every_byte_is_right(planted):
    assert planted.unchanged("tiles", 3 * SEEDS) == "nothing"


@pytest.mark.parametrize("header", TABLES)
def test_mutants_are_reported_by_name(planted, header):
    assert not planted.unnoticed(header)
