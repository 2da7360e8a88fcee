# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/coarse/quantise_tiles.h by itself: every byte; mutants by what they get wrong."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted, build

PROGRAM = ROOT / "tests" / "cpp" / "quantise_tiles.cpp"
HEADER = "kernels/coarse/quantise_tiles.h"
SEEDS = 12
WRONG = "WRONG NUMBERS in "

MUTANTS: MutantTable = {
    "InvalidTextCounts": (
        "load_floats<Element, kChannels>(x.data, x.offset(batch, token, head) + channel, there)",
        "load_floats<Element, kChannels>(x.data, x.offset(batch, token, head) + channel, true)",
        WRONG + "(means|values|scales of values)",
    ),
    "TextEntersTheMean": (
        "if (at.region != Region::Video) continue;",
        "",
        WRONG + "means",
    ),
    "RowsCountedAsIfAllWereTokens": (
        "count += popcount(rows & kSampledRows);",
        "count += 4;",
        WRONG + "means",
    ),
    "InfinityEntersTheLargest": (
        "return bits < kInfinityBits ? bits : 0;",
        "return bits;",
        WRONG + "scales of values",
    ),
    "NaNEntersTheMean": (
        "const bool kept = x.x[c] >= -kMostInMean && x.x[c] <= kMostInMean;",
        "const bool kept = true;",
        WRONG + "means",
    ),
    "LastTilesLeft": (
        "return ceil_div(keys.num_tiles(), kTiles);",
        "return keys.num_tiles() / kTiles;",
        WRONG + "(means|scales of values)",
    ),
    "MeanNotSubtracted": (
        "x[i].x[c] = rows != 0 ? x[i].x[c] - means.x[c] : 0;",
        "x[i].x[c] = rows != 0 ? x[i].x[c] : 0;",
        WRONG + "scales of keys",
    ),
    "MeanOfTheFirstChannels": (
        "means[lane].x[c] = mean(p, of_head, Lanes::channel(lane) + c);",
        "means[lane].x[c] = mean(p, of_head, c);",
        WRONG + "scales of keys",
    ),
    "ScaleOfALane": (
        "const int bits = greatest([&](int lane) { return most[lane]; });",
        "const int bits = most[0];",
        WRONG + "scales of keys",
    ),
    "NegativeKeysForgotten": (
        "const int bits = float_bits(x.x[c]) & 0x7fffffff; most[lane]",
        "const int bits = float_bits(x.x[c]); most[lane]",
        WRONG + "scales of keys",
    ),
    "NaNClamped": (
        "lane > 0 ? 0 : finite ? magnitude / kMost : float_of(kNanBits)",
        "lane > 0 ? 0 : magnitude / kMost",
        WRONG + "scales of keys",
    ),
    "GapsAreZeros": (
        "rows >> row & 1 ? row : first, rows != 0,",
        "row, rows >> row & 1,",
        WRONG + "(scales of )?keys",
    ),
    "KeysSwizzledAsValues": (
        "Keys::place(row, Lanes::channel(lane))",
        "row * D + Lanes::channel(lane)",
        WRONG + "keys",
    ),
    "HalfOfTheChannels": ("words[1] = finite ? pack(4) : 0;", "", WRONG + "keys"),
    "ValuesInTheOrderOfKeys": (
        "const int row = key_at(place + i); x[i]",
        "const int row = place + i; x[i]",
        WRONG + "values",
    ),
    "SumsInTheOrderOfKeys": (
        "rows >> key_at(place + i) & 1 ? 1.f : 0.f",
        "rows >> (place + i) & 1 ? 1.f : 0.f",
        WRONG + "rows of sums",
    ),
    "InfiniteValuesClamped": (
        "return finite ? x[i].x[c] * factor : float_of(kNanBits);",
        "return x[i].x[c] * factor;",
        WRONG + "values",
    ),
    "AllRowsAreSums": (
        "row == 0 ? pack8<E4m3>(one(0), one(1), one(2), one(3)) : 0",
        "pack8<E4m3>(one(0), one(1), one(2), one(3))",
        WRONG + "rows of sums",
    ),
    "ScalesOfTheFirstHead": (
        "p.channels[(of_head * 2 + 1) * D + c] =",
        "p.channels[D + c] =",
        WRONG + "scales of values",
    ),
}


def test_every_byte_is_right(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "quantise_tiles", *flags)
    assert program("vsa", "tiles", 3 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(compiler, tmp_path):
    tables = {HEADER: {("tiles",): MUTANTS}}
    includes = ("kernels/schedule/sequence.h", "prim/warp.h", "tile/quantised_tile.h")
    planted = Planted(compiler, PROGRAM, tmp_path, (HEADER,), tables, ("tiles",), SEEDS, *includes)
    assert not planted.unnoticed(HEADER)
