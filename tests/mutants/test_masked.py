# SPDX-License-Identifier: Apache-2.0
"""Kernels under a mask over tiles by themselves: every tile right, and mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "masked.cpp"
RULE = "kernels/select/tile_rule.h"
ORDER = "kernels/select/time_order.h"
ROW = "kernels/select/score_row.h"
SOFTMAX = "kernels/select/softmax_row.h"
SELECT = "kernels/select/select_tiles.h"
PRODUCT = "kernels/coarse/float_product.h"
HEADERS = RULE, ORDER, ROW, SOFTMAX, SELECT, PRODUCT
PROBLEMS = ("rule", "select", "product")
SEEDS = 40
TILES, LAYERS, BLOCKS = "WRONG TILES", "WRONG LAYERS", "WRONG BLOCKS"
RUNS = "WRONG RUNS"
CHOICE, WEIGHTS, NUMBERS = "WRONG CHOICE", "WRONG WEIGHTS", "WRONG NUMBERS"

OF_RULES: MutantTable = {
    "WindowOneShort": ("(window - 1) * chunk", "(window - 2) * chunk", TILES),
    "SinksForgotten": ("one = {0, least(sinks * chunk, other.first)};", "", TILES),
    "SinksOfTheFuture": ("least(sinks * chunk, other.first)", "sinks * chunk", f"{TILES}|{BLOCKS}"),
    "ChunkSeesTheNext": ("least(own + chunk, key_layers)", "key_layers", TILES),
    "NoisySeesItsCleanSelf": ("noisy ? own : after", "after", TILES),
    "CleanSeesNoisy": ("noisy ? clean + after : 0", "clean + after", TILES),
    "NoisyLosesItself": ("noisy ? clean + own : 0", "clean + after", TILES),
    "NearOnOneSide": ("most(at - reach_t, 0)", "at", TILES),
    "FarLines": ("near(line, line_, rule_.reach_h) &&", "", TILES),
    "FarPlaces": ("&& near(place, place_, rule_.reach_w)", "", TILES),
    "QueriesAtTheBeginning": (
        "rule_.spans(at + rule_.offset, one_, other_);", "rule_.spans(at, one_, other_);", TILES,
    ),
    "RunsAtTheBeginning": (
        "rule.spans(rule.layer.quotient(tile) + rule.offset,",
        "rule.spans(rule.layer.quotient(tile),", f"{TILES}|{RUNS}",
    ),
    "EmptyRunAtTheBeginning": (
        "if (other_.length() == 0) other_ = {one_.after, one_.after};", "", RUNS,
    ),
    "CountOfOneRun": ("return one_.length() + other_.length();", "return other_.length();", RUNS),
    "OneRunHas": ("one_.holds(column) || other_.holds(column)", "other_.holds(column)", TILES),
    "FirstRunNotRead": ("for (int i = one_.length() > 0 ? 0 : 1; i < 2; ++i)",
                        "for (int i = 1; i < 2; ++i)", RUNS),
    "FirstGapForgotten": ("for (int i = 0; i < 2; ++i)", "for (int i = 1; i < 2; ++i)", RUNS),
    "LastGapForgotten": ("Run{other_.after, columns_});", "Run{columns_, columns_});", RUNS),
    "SinksNotSeen": ("|| own < sinks);", ");", LAYERS),
    "LastQueriesForgotten": ("from <= last &&", "from < last &&", LAYERS),
    "NearLayersForgotten": ("at - reach_t < offset + query_layers", "at < offset", LAYERS),
    "BlocksEndEarly": (
        "layer.quotient(keys.after - 1) + 1", "layer.quotient(keys.after - 1)", BLOCKS,
    ),
    "NoSecondHead": ("|| meets_in_order({0, after - tiles}, keys)", "", BLOCKS),
    "OnlyTheFirstLayer": ("at <= last; ++at", "at <= last; at += 1000", BLOCKS),
    "SinksHaveNoBlocks": ("one.meets(layers) ||", "", BLOCKS),
}  # fmt: skip

OF_BITMAPS: MutantTable = {
    "AnyHead": ("row / mask.query_tiles % mask.heads", "0", CHOICE),
    "AnyBit": ("column % kWordBits & 1", "0 & 1", CHOICE),
}

OF_ROWS: MutantTable = {
    "ForbiddenScoresRead": (
        "if (i < kSureWords || may_hold(first, i, lane, left)) score",
        "if (i < kSureWords || i * kWarpThreads < left) score", CHOICE,
    ),
    "ForbiddenWeights": (
        "real = i < kSureWords || may_hold(first, i, lane, left);",
        "real = i < kSureWords || i * kWarpThreads < left;", CHOICE,
    ),
    "ForcedOutside": (
        "(!kMasked || allowed_.has(word * kWordBits + lane))) part_", "true) part_", CHOICE,
    ),
    "AllMayBeChosen": (
        "num_allowed_ = allowed_.count();", "num_allowed_ = columns_;", CHOICE,
    ),
    "WordsOfAll": (
        "columns = ballot([&](int lane) { return allowed_.has(word * kWordBits + lane); });", "",
        CHOICE,
    ),
    "ShareOfAllTiles": ("ceil(allowed * share)", "ceil(columns * share)", CHOICE),
    "SharesRoundedDown": ("ceil(allowed * share)", "floor(allowed * share)", CHOICE),
}  # fmt: skip

OF_SOFTMAX: MutantTable = {
    "OthersNotCleared": ("weights[column] = there ? weight(score) * share : 0;",
                         "if (there) weights[column] = weight(score) * share;", WEIGHTS),
    "GapsNotCleared": ("column += kWarpThreads) weights[column] = 0;", "column += kWarpThreads) ;",
                       WEIGHTS),
    "RunsFromWordsOn": (
        "inside[i] = run.holds(column);", "inside[i] = column < run.after;", WEIGHTS,
    ),
    "PartOfARunLeft": (
        "first += kTogether * kWarpThreads)", "first += 2 * kTogether * kWarpThreads)", WEIGHTS,
    ),
}  # fmt: skip

OF_CHOICES: MutantTable = {
    "ForbiddenTies": ("if constexpr (kMasked) ties &= columns;", "", CHOICE),
    "ForbiddenLast": ("if constexpr (kMasked) return bits & columns;", "", CHOICE),
    "MassOneShort": (">= mass ? high : low", "> mass ? high : low", CHOICE),
}

OF_PRODUCTS: MutantTable = {
    "AllBlocks": ("if (one.is_left_out()) return;", "", NUMBERS),
    "StepsOfOtherRows": (
        "? meets(first_row_, p_.rows, first, p_.depth)", "? meets(0, p_.rows, first, p_.depth)",
        NUMBERS,
    ),
    "StepsOfOtherKeys": (
        ": meets(first, p_.depth, first_row_, p_.rows)", ": meets(first, p_.depth, 0, p_.rows)",
        NUMBERS,
    ),
    "OneBlockTwice": ("? rows - 1 - row : row", "? rows - 1 : row", NUMBERS),
    "ColumnsOfAnother": ("(matrix * rows + from_end) * columns + column",
                         "(matrix * rows + from_end) * columns", NUMBERS),
    "MatrixOfAnother": ("(matrix * rows + from_end)", "(0 * rows + from_end)", NUMBERS),
    "FirstStepsOnly": ("first = (first / kAtOnce + 1) * kAtOnce", "first = p_.depth", NUMBERS),
    "StepsOfTheFirstOnes": ("has_step(begin + lane * kTileRows)", "has_step(lane * kTileRows)",
                            NUMBERS),
    "OneStepTooFar": ("steps_ & ~0u << (first - begin) / kTileRows",
                      "steps_ & ~1u << (first - begin) / kTileRows", NUMBERS),
    "BlocksOfTheFirstQueries": ("first + query, first + after", "query, after", NUMBERS),
    "NextStepWhateverItIs": ("next = step_from(first + kTileRows);", "next = first + kTileRows;",
                             NUMBERS),
    "FirstStepWhateverItIs": ("first = step_from(0);", "first = 0;", NUMBERS),
}  # fmt: skip


def test_every_tile_is_right_and_mutants_are_reported_by_name(compiler, tmp_path):
    tables = {
        RULE: {("rule",): OF_RULES, ("select",): OF_BITMAPS},
        ROW: {("select",): OF_ROWS},
        SOFTMAX: {("select",): OF_SOFTMAX},
        SELECT: {("select",): OF_CHOICES},
        PRODUCT: {("product",): OF_PRODUCTS},
    }
    includes = (
        "tile/tile.h",
        "prim/warp.h",
        "kernels/select/softmax_mass.h",
    )
    planted = Planted(compiler, PROGRAM, tmp_path, HEADERS, tables, PROBLEMS, SEEDS, *includes)
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
    assert not {header: found for header in tables if (found := planted.unnoticed(header))}
