# SPDX-License-Identifier: Apache-2.0
"""Kernels of chunks by themselves: every number right, and mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "chunks.cpp"
MEANS = "kernels/coarse/tile_means.h"
CHUNK = "kernels/coarse/chunk_means.h"
REORDER = "kernels/select/reorder_bitmap.h"
ORDER = "kernels/select/time_order.h"
ROW = "kernels/select/score_row.h"
SELECT = "kernels/select/select_tiles.h"
HEADERS = MEANS, CHUNK, REORDER, ORDER, ROW, SELECT
PROBLEMS = ("fill", "reorder", "ties")
SEEDS = 60
TOKENS, NUMBERS, BITS, CHOICE = "WRONG TOKENS", "WRONG MEANS", "WRONG BITS", "WRONG CHOICE"

OF_MEANS: MutantTable = {
    "PaddingKept": ("if (there) kept.token(at + i, token[i]);", "kept.token(at + i, token[i]);",
                    TOKENS),
    "OnlyTheFirstEight": ("kept.token(at + i, token[i]);", "kept.token(i, token[i]);", TOKENS),
    "MeansInOneSlot": ("first = kept.mean(tile);", "first += 0;", NUMBERS),
}  # fmt: skip

OF_CHUNKS: MutantTable = {
    "QueriesTurnToo": ("to_.video == nullptr || p.slot == nullptr", "p.slot == nullptr", NUMBERS),
    "AlwaysTheFirstSlot": ("static_cast<int>(load_global(p.slot))", "0", TOKENS),
    "MeansOfTheFirstHead": ("(int64_t{batch} * x.heads + head) * to_.means_stride",
                            "int64_t{batch} * x.heads * to_.means_stride", NUMBERS),
    "MeansOfTheFirstElement": ("(int64_t{batch} * x.heads + head) * to_.means_stride",
                               "int64_t{head} * to_.means_stride", NUMBERS),
    "MeansOfTheFirstSlot": ("int64_t{slot_} * x.grid.num_tiles() * p.head_dim", "0", NUMBERS),
    "TextCountsInSlots": ("first - x.grid.prefix", "first", TOKENS),
    "SlotsWithText": ("int64_t{slot_} * x.grid.video.volume()",
                      "int64_t{slot_} * x.grid.num_tokens()", TOKENS),
    "TokensOfTheFirstElement": ("tokens_ = batch * to_.batch_stride +", "tokens_ =", TOKENS),
    "TokensOfTheFirstHead": ("head * to_.head_stride + token * to_.token_stride + channel",
                             "token * to_.token_stride + channel", TOKENS),
    "RowsFollowEachOther": ("p_.row_tokens[row] * to_.token_stride", "row * to_.token_stride",
                            TOKENS),
    "TileOfTheFirst": ("means_ + int64_t{tile} * p_.head_dim", "means_", NUMBERS),
    "HalfOfEachPair": ("pack<Element>(values.x[2 * i], values.x[2 * i + 1])",
                       "pack<Element>(values.x[2 * i], values.x[2 * i])", TOKENS),
    "InBf16": ("pack<Element>(values.x[0], 0.f)", "pack<Bf16>(values.x[0], 0.f)", TOKENS),
    "TextOfTheFirstElement": ("batch = text / x.grid.prefix;", "batch = 0;", TOKENS),
    "TextOfTheFirstHead": ("head = row % x.heads;", "head = 0;", TOKENS),
    "TextAsItWasGiven": ("token * to.token_stride;", "token * x.token_stride;", TOKENS),
    "TextOfOneChannel": ("load_floats<Element, N>(x.data, from + channel, true)",
                         "load_floats<Element, N>(x.data, from, true)", TOKENS),
}  # fmt: skip

OF_BITMAPS: MutantTable = {
    "TheOtherWay": ("static_cast<int>(load_global(p.order + chunk))", "chunk", BITS),
    "RowOfTheFirst": ("p.source + (lane - word)", "p.source", BITS),
    "PastTheChunk": ("in_chunk < to_end ? in_chunk : to_end", "to_end", BITS),
    "PastTheEnd": ("left < kWordBits ? left : kWordBits", "kWordBits", BITS),
    "AllInFront": ("count) << (at - begin)", "count)", BITS),
    "PlacesForgotten": ("p.per_chunk + place;", "p.per_chunk;", BITS),
    "OneWordAlone": ("if (shift + count > kWordBits)", "if (shift > kWordBits)", BITS),
    "MoreThanAsked": ("& (~0u >> (kWordBits - count))", "", BITS),
}

OF_ORDERS: MutantTable = {
    "SinksTurnToo": ("return {ring,", "return {0,", CHOICE),
    "SlotsOfOneTile": ("load_global(oldest)) * per_slot", "load_global(oldest))", CHOICE),
    "WordsOfTheFirst": ("column - word * kWordBits", "column", CHOICE),
    "RunsBeginAtNothing": ("& ~below(run.first)", "", CHOICE),
}

OF_CHOICES: MutantTable = {
    "OrderForgotten": ("if (p.order.known() && cut.room != INT_MAX)",
                       "if (p.order.known() && cut.room < 0)", CHOICE),
    "LateOnesCounted": ("early += popcount(ties & ~TimeOrder::bits_of(last, word));",
                        "early += popcount(ties);", CHOICE),
    "RoomForAll": ("room > early ? room - early : 0", "room", CHOICE),
    "RoomIsKept": ("room -= popcount(found);", "", CHOICE),
    "LateFirst": ("first_of(ties & ~late, room) | first_of(ties & late, late_room)",
                  "first_of(ties & late, room) | first_of(ties & ~late, late_room)", CHOICE),
    "NoneAbove": ("score(lane) > cut.last;", "score(lane) > INFINITY;", CHOICE),
    "ScoresOfTheFirstRow": ("const float* scores = p.scores + int64_t{row} * p.columns;",
                            "const float* scores = p.scores;", CHOICE),
    "NumbersAlone": ("max2(scores[column], -INFINITY)", "scores[column]", CHOICE),
    "PastTheLastColumn": ("column < p.columns ? max2(scores[column], -INFINITY) : NAN",
                          "column < p.columns ? max2(scores[column], -INFINITY) : -INFINITY",
                          CHOICE),
}  # fmt: skip


def test_every_number_is_right_and_mutants_are_reported_by_name(compiler, tmp_path):
    tables = {
        MEANS: {("fill",): OF_MEANS},
        CHUNK: {("fill",): OF_CHUNKS},
        REORDER: {("reorder",): OF_BITMAPS},
        ORDER: {("ties",): OF_ORDERS},
        SELECT: {("ties",): OF_CHOICES},
    }
    includes = (
        "kernels/schedule/sequence.h",
        "kernels/select/softmax_mass.h",
        "kernels/select/softmax_row.h",
        "kernels/select/tile_rule.h",
        "prim/warp.h",
    )
    planted = Planted(compiler, PROGRAM, tmp_path, HEADERS, tables, PROBLEMS, SEEDS, *includes)
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
    assert not {header: found for header in HEADERS[:4] if (found := planted.unnoticed(header))}
    assert not planted.unnoticed(SELECT)
