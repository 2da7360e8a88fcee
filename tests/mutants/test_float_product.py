# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/coarse/float_product.h by itself: every bit right, and mutants by their names."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "float_product.cpp"
HEADER = "kernels/coarse/float_product.h"
PROBLEMS = ("product", "gradient")
SEEDS = 27
WRONG = "WRONG NUMBERS"

IN_PRODUCTS: MutantTable = {
    "RightNotFenced": ("fence_async_proxy();", "", "MISSING PROXY FENCE .*right"),
    "WarpsNotMet": (
        "named_sync(consumer_barrier(0), kThreads);",
        "",
        "MISSING NAMED BARRIER .*right",
    ),
    "SumsNotAwaited": ("wgmma_wait<0>(sum_);", "", "FRAGMENT IN FLIGHT: .*an accumulator"),
    "SumsWaitTooShallow": (
        "wgmma_wait<0>(sum_);",
        "wgmma_wait<1>(sum_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "PiecesTakenInFlight": (
        "wgmma_wait<0>(sum_);",
        "for (auto& piece : left_) take_piece(piece, left_values_); wgmma_wait<0>(sum_);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "OneStageOfTiles": ("put_right(stage ^ 1);", "put_right(stage);", "RACE: .*right"),
    "StageNeverChanges": ("stage ^= 1) {", "stage ^= 0) {", WRONG),
    "NextNotFetched": ("fetch(next);", "", WRONG),
    "NextNotPut": ("put_right(stage ^ 1);", "", f"NEVER WRITTEN: .*right|{WRONG}"),
    "SumsKept": (
        "mma_ABt<Bf16>(sum_, left_[kLow], right[kHigh]);",
        "mma_ABt<Bf16>(sum_, left_[kLow], right[kHigh], true);",
        WRONG,
    ),
    "LowOfLeftForgotten": (
        "left_[kLow], right[kHigh]",
        "left_[kLow], right[kLow]",
        WRONG,
    ),
    "MiddlesForgotten": ("mma_ABt<Bf16>(sum_, left_[kMiddle], right[kMiddle], true);", "", WRONG),
    "LowOfRightForgotten": ("mma_ABt<Bf16>(sum_, left_[kHigh], right[kLow], true);", "", WRONG),
    "MiddleOfLeftForgotten": (
        "mma_ABt<Bf16>(sum_, left_[kMiddle], right[kHigh], true);",
        "",
        WRONG,
    ),
    "MiddleOfRightForgotten": (
        "mma_ABt<Bf16>(sum_, left_[kHigh], right[kMiddle], true);",
        "",
        WRONG,
    ),
    "HighForgotten": ("mma_ABt<Bf16>(sum_, left_[kHigh], right[kHigh], true);", "", WRONG),
    "LeftOverNotLeft": ("x[2 * r + 1] -= widen_high<Bf16>(pairs[r]);", "", WRONG),
    "OnlyTheLastSums": ("return total + sum;", "return sum;", WRONG),
    "PairsPastTheEnd": (
        "load_global(pair, inside[half] && at < columns)",
        "load_global(pair, inside[half])",
        WRONG,
    ),
    "NumbersPastTheEnd": (
        "load_global(starts[half] + at * x.column_stride, inside[half] && at < columns)",
        "load_global(starts[half] + at * x.column_stride, inside[half])",
        WRONG,
    ),
    "RowsStoredPastTheEnd": (
        "if (row >= p_.rows || column >= p_.columns) continue;",
        "if (row >= p_.rows + 1 || column >= p_.columns) continue;",
        WRONG,
    ),
    "ColumnsStoredPastTheEnd": (
        "if (row < p_.rows && column + j < p_.columns)",
        "if (row < p_.rows && column + j < p_.columns + 1)",
        WRONG,
    ),
    "NotScaled": ("sum *= scale;", "sum *= 1;", WRONG),
    "AddedToWhatThereIs": ("!OfScores && p_.accumulate", "!OfScores", WRONG),
}

IN_GRADIENTS: MutantTable = {
    "DeltaOfOneLane": ("quad_reduce(delta_, [](float a, float b) { return a + b; });", "", WRONG),
    "DeltaForgotten": ("return sum - delta;", "return sum;", WRONG),
    "DeltaNotZeroed": ("fill(delta_, 0.f);", "", WRONG),
    "WeightsForgotten": ("return sum * weight;", "return sum;", WRONG),
    "DeltaOfTheWrongRow": (
        "row[i >> 1 & 1] = fma(left[i], outputs[i], row[i >> 1 & 1]);",
        "row[0] = fma(left[i], outputs[i], row[0]);",
        WRONG,
    ),
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    tables = {HEADER: {("product",): IN_PRODUCTS, ("gradient",): IN_GRADIENTS}}
    folder = tmp_path_factory.mktemp("float_product")
    includes = ("tile/tile.h", "kernels/select/tile_rule.h")
    return Planted(compiler, PROGRAM, folder, (HEADER,), tables, PROBLEMS, SEEDS, *includes)


def test_every_bit_is_right(planted):
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(planted):
    assert not planted.unnoticed(HEADER)
