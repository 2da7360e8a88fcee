# SPDX-License-Identifier: Apache-2.0
"""Kernels under a mask over tiles by themselves: every tile right, and mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "masked.cpp"
RULE = "kernels/select/tile_rule.h"
ROW = "kernels/select/score_row.h"
SOFTMAX = "kernels/select/softmax_row.h"
SELECT = "kernels/select/select_tiles.h"
PRODUCT = "kernels/coarse/float_product.h"
HEADERS = RULE, ROW, SOFTMAX, SELECT, PRODUCT
PROBLEMS = ("rule", "select", "product")
SEEDS = 40
TILES, LAYERS, BLOCKS = "WRONG TILES", "WRONG LAYERS", "WRONG BLOCKS"
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
    "ForbiddenScoresRead": ("left && may_hold(first, i, lane))) score", "left)) score", CHOICE),
    "ForbiddenWeights": (
        "(i * kWarpThreads < left && may_hold(first, i, lane)); part_",
        "(i * kWarpThreads < left); part_", CHOICE,
    ),
    "ForcedOutside": ("&& may_hold(first, i, lane)) part_", ") part_", CHOICE),
    "ShareOfAllTiles": ("ceil(allowed * share)", "ceil(columns * share)", CHOICE),
    "SharesRoundedDown": ("ceil(allowed * share)", "floor(allowed * share)", CHOICE),
}  # fmt: skip

OF_SOFTMAX: MutantTable = {
    "OthersNotCleared": ("if (!allowed(column)) weights[column] = 0;", ";", WEIGHTS),
}  # fmt: skip

OF_CHOICES: MutantTable = {
    "ForbiddenTies": ("if constexpr (Masked) ties &= columns;", "", CHOICE),
    "ForbiddenLast": ("if constexpr (Masked) return bits & columns;", "", CHOICE),
    "MassOneShort": (">= mass ? high : low", "> mass ? high : low", CHOICE),
}

OF_PRODUCTS: MutantTable = {
    "AllBlocks": ("if (one.is_left_out()) return;", "", NUMBERS),
    "StepsOfOtherRows": (
        "!meets(first_row_, p_.rows, first, p_.depth)", "!meets(0, p_.rows, first, p_.depth)",
        NUMBERS,
    ),
    "StepsOfOtherKeys": (
        "!meets(first, p_.depth, first_row_, p_.rows)", "!meets(first, p_.depth, 0, p_.rows)",
        NUMBERS,
    ),
    "BlocksOfTheFirstQueries": ("first + query, first + after", "query, after", NUMBERS),
    "AllStepsOfQueries": ("if (sides_ == Sides::DepthAndRows)", "if (false)", NUMBERS),
    "AllStepsOfKeys": ("if (sides_ == Sides::RowsAndDepth)", "if (false)", NUMBERS),
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
        "kernels/select/time_order.h",
    )
    planted = Planted(compiler, PROGRAM, tmp_path, HEADERS, tables, PROBLEMS, SEEDS, *includes)
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
    assert not {header: found for header in HEADERS if (found := planted.unnoticed(header))}
