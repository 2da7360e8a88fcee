# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/select/kept_tiles.h by itself: every bit right, and mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "kept_tiles.cpp"
HEADER = "kernels/select/kept_tiles.h"
PROBLEMS = ("kept", "wrong", "hidden")
SEEDS = 60
BITS, LENGTH, SIZE, TAKEN, SCORES = (
    "WRONG BITS",
    "WRONG LENGTH",
    "WRONG SIZE OF A PART",
    "WRONG NUMBER TAKEN",
    "WRONG SCORES",
)
UNREAD = "WRONG NUMBER: a size, a count"
"""What is past the end of a list is none that may be read."""

OF_BITS: MutantTable = {
    "FirstColumnsAgain": ("kept.gather(word * kWordBits);", "kept.gather(0);", BITS),
    "GatheredOnce": ("word % kWarpThreads == 0) kept.gather", "word == 0) kept.gather", BITS),
    "WordsOfOthersKept": ("gathered_[lane] = 0;", ";", BITS),
    "ListOfTheFirst": ("p_.lists + int64_t{row_} * p_.width", "p_.lists", f"{BITS}|{UNREAD}"),
    "CountOfTheFirst": ("p_.counts + row_", "p_.counts", f"{BITS}|{UNREAD}"),
    "PastTheCount": ("lane < here ? lane : 0", "lane", UNREAD),
    "LastEntryLeft": ("for (int i = 0; i < here; ++i)", "for (int i = 1; i < here; ++i)", BITS),
    "ColumnsBefore": ("if (column < 0) continue;", "", BITS),
    "InAllLanes": ("if (column / kWordBits == lane) gathered_", "gathered_", BITS),
    "WordOfTheFirst": ("broadcast(gathered_, word % kWarpThreads)", "broadcast(gathered_, 0)",
                       BITS),
    "BitmapOfTheFirst": ("p_.words[int64_t{row_} * bitmap::words(p_.columns) + word]",
                         "p_.words[word]", BITS),
    "MapOfTheFirst": ("int64_t{row_} * p_.columns + column) != 0", "column) != 0", BITS),
    "PartsInOneWord": ("const int word = of_word * p_.parts + which, words",
                       "const int word = of_word * p_.parts, words", BITS),
    "OneWordForAllParts": ("(kept >> column % kWordBits & 1) != 0",
                           "(kept >> tile % kWordBits & 1) != 0", BITS),
    "EmptyKept": ("&& load_global(p_.kv_sizes + column) > tile % p_.parts * kTileRows;", ";", BITS),
    "EmptyPartsKept": ("> tile % p_.parts * kTileRows", "> 0", BITS),
    "EmptyAsk": ("in_part(size_, lane) > 0 ? bits : 0;", "bits;", BITS),
    "RowsOfOnePart": ("int64_t{row_} * p_.parts + part;", "int64_t{row_} + part;", BITS),
    "SizeOfTheFirst": ("row % p.query_tiles", "0", BITS),
    "LengthOfTheLastWord": ("length_ += popcount(bits);", "length_ = popcount(bits);", LENGTH),
    "LengthOfEmptyRows": ("in_part(size_, lane) > 0 ? length_ : 0;", "length_;", LENGTH),
    "LengthOfTheFirstPart": ("if (lane < p_.parts) p_.lengths", "if (lane < 1) p_.lengths", LENGTH),
    "SizesOfTheFirstPart": ("p_.part_sizes[column * p_.parts + part]",
                            "p_.part_sizes[column * p_.parts]", SIZE),
    "NegativeSizes": ("left < 0 ? 0 : left > kTileRows", "left > kTileRows", f"{SIZE}|{BITS}"),
    "SizesAboveATile": ("left > kTileRows ? kTileRows : left", "left", SIZE),
    "SizesOfTheFirstLanes": ("column += kWarpThreads) { const int size = size_of",
                             "column += p_.columns) { const int size = size_of", SIZE),
}  # fmt: skip

OF_NUMBERS: MutantTable = {
    "SizesNotLookedAt": ("stop_unless(size >= 0 && size <= p_.slots());", "", TAKEN),
    "SizesOfKeysNotLookedAt": ("if (row == 0) kept.look_at_sizes();", "", TAKEN),
    "SizesOfOnePart": ("return parts * kTileRows;", "return 4 * kTileRows;", TAKEN),
    "CountsNotLookedAt": ("stop_unless(count >= 0 && count <= p_.width);", "", f"{TAKEN}"),
    "TilesNotLookedAt": ("stop_unless(entry[lane] >= 0 && entry[lane] < p_.columns);", "", TAKEN),
    "TilesMayBeOneMore": ("entry[lane] < p_.columns);", "entry[lane] <= p_.columns);", TAKEN),
}

OF_SCORES: MutantTable = {
    "ScoresOfTheFirst": ("p.scores + int64_t{row} * p.columns;", "p.scores;", SCORES),
    "FirstLanesAlone": ("column += kWarpThreads) { const int size = load_global",
                        "column += p.columns) { const int size = load_global", SCORES),
    "FullOnesHidden": ("if (size == 0) scores", "if (size == kTileRows) scores", SCORES),
    "HiddenAsZero": ("kEmptyScore = -1e30f", "kEmptyScore = 0", SCORES),
    "NumbersNotLookedAt": ("stop_unless(size >= 0 && size <= kTileRows);", "", TAKEN),
}  # fmt: skip


def test_every_bit_is_right_and_mutants_are_reported_by_name(compiler, tmp_path):
    tables = {HEADER: {("kept",): OF_BITS, ("wrong",): OF_NUMBERS, ("hidden",): OF_SCORES}}
    includes = "kernels/schedule/sequence.h", "prim/warp.h"
    planted = Planted(compiler, PROGRAM, tmp_path, (HEADER,), tables, PROBLEMS, SEEDS, *includes)
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 4 * SEEDS) == "nothing"
    assert not planted.unnoticed(HEADER)
