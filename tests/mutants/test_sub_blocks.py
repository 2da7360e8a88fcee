# SPDX-License-Identifier: Apache-2.0
"""Means of runs and their scores by themselves: right numbers, and mutants by their names."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "sub_blocks.cpp"
HEADERS = {
    "means": "kernels/coarse/run_means.h",
    "scores": "kernels/coarse/sub_block_scores.h",
}
SEEDS = 24
WRONG = "WRONG NUMBERS"

OF_MEANS: MutantTable = {
    "NotAdded": ("add(part_[lane], tokens_[lane].x[i]);", "", WRONG),
    "RunNotDivided": ("x /= static_cast<float>(size);", "x /= 1;", WRONG),
    "RunNotCleared": ("float_of(runs::factor_bits(exponent))); clear(part_);",
                      "float_of(runs::factor_bits(exponent)));", WRONG),
    "LongerRunsLast": ("missing = wanted = shorter + (run < longer);",
                       "missing = wanted = shorter + (run >= p_.runs - longer);", WRONG),
    "FirstRunTooShort": ("wanted = shorter + (0 < longer)", "wanted = shorter", WRONG),
    "ClippedRowsInRuns": ("if ((left >> i & 1) == 0) continue;", ";", WRONG),
    "ClippedRowsInMeans": ("const bool there = (left >> i & 1) != 0;",
                           "const bool there = true;", WRONG),
    "EmptySlotsNotWritten": ("for (; run < p_.slots; ++run) put_nothing(run);", "", WRONG),
    "EmptySlotsLookFull": ("put_row(run, 0, -1);", "put_row(run, 0, 1);", WRONG),
    "SignsInTheLargest": ("float_bits(x) & 0x7fffffff", "float_bits(x)", WRONG),
    "LargestOfTheFirstLanes": ("own = bits > own ? bits : own;",
                               "own = lane < 8 && bits > own ? bits : own;", WRONG),
    "NotScaled": ("float_of(runs::scale_bits(exponent)), float_of", "1, float_of", WRONG),
    "FactorOfAnother": ("float_of(runs::factor_bits(exponent))",
                        "float_of(runs::factor_bits(exponent + 1))", WRONG),
    "HalfOfEachPair": ("part_[lane].x[c + 1] * scale", "part_[lane].x[c] * scale", WRONG),
    "KeysInPlainOrder": (
        "const int64_t byte = x_.are_keys ?", "const int64_t byte = false ?", WRONG),
    "FactorsInPlainOrder": ("x_.factors[x_.are_keys ?", "x_.factors[false ?", WRONG),
    "BlockOfTheFirstTiles": ("p_.slots) + tile_ / tiles;", "p_.slots);", WRONG),
    "MeanNotDivided": ("total_[lane].x[c] / size;", "total_[lane].x[c];", WRONG),
    "HalfOfTheTokens": ("add(token[i], token[i + half]);", ";", WRONG),
}  # fmt: skip

OF_SCORES: MutantTable = {
    "KeysNotAwaited": (
        "if (n < work_.steps) s_.full[Ring<kStages>::stage(n)].wait(Ring<kStages>::use(n));",
        "",
        "RACE: .*keys|NEVER WRITTEN: .*keys",
    ),
    "StageNotReleased": ("s_.empty[stage].arrive_all();", "", "DEADLOCK"),
    "ReleasedBeforeFactorsAreRead": (
        "read_factors(stage); s_.empty[stage].arrive_all();",
        "s_.empty[stage].arrive_all(); read_factors(stage);",
        "RACE: .*factors",
    ),
    "ReleasedBeforeProductsAreDone": (
        "wgmma_commit();",
        "wgmma_commit(); s_.empty[stage].arrive_all();",
        "RACE: .*keys|TOO MANY ARRIVALS",
    ),
    "StageOverwritten": (
        "s.empty[stage].wait(Ring<kStages>::use(n) - 1);",
        "",
        "RACE: .*(keys|factors)|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "OneConsumerIsEnough": (
        "s.empty[i].init(kConsumers * kWarpgroupThreads, \"empty\", i);",
        "s.empty[i].init(kWarpgroupThreads, \"empty\", i);",
        "RACE: .*(keys|factors)|TOO MANY ARRIVALS",
    ),
    "TooFewBytes": (
        "arrive_expect_tx(kImageBytes + kFactorBytes)",
        "arrive_expect_tx(kImageBytes)",
        "WRONG EXPECT_TX|RACE: .*factors|LOADS STILL IN FLIGHT",
    ),
    "FactorsNotLoaded": (
        "bulk_load(s.factors[stage], p.key_factors + block * kTileRows, kFactorBytes, "
        "s.full[stage]);",
        "",
        "WRONG EXPECT_TX|DEADLOCK|NEVER WRITTEN: .*factors",
    ),
    "KeysInPlainOrder": ("Layout::Swizzled", "Layout::Linear", "WRONG SWIZZLE: .*keys"),
    "EvenNotAwaited": (
        "wgmma_wait<1>(even.half[0], even.half[1]);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "OddNotAwaited": (
        "wgmma_wait<0>(odd.half[0], odd.half[1]);",
        "wgmma_wait<1>(odd.half[0], odd.half[1]);",
        "FRAGMENT IN FLIGHT: .*an accumulator|WGMMA STILL IN FLIGHT",
    ),
    "LastNotAwaited": (
        "wgmma_wait<0>(even.half[0], even.half[1]);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "LastStepForgotten": ("if (n < work_.steps) { issue(even, n);",
                          "if (n + 1 < work_.steps) { issue(even, n);",
                          f"{WRONG}|DEADLOCK|LOADS STILL IN FLIGHT"),
    "OneHalfTwice": ("mma_ABt<Fp16>(sums.half[1], queries_[1], s_.keys[stage]);",
                     "mma_ABt<Fp16>(sums.half[1], queries_[0], s_.keys[stage]);", WRONG),
    "ProductsInBf16": ("mma_ABt<Fp16>(sums.half[0]", "mma_ABt<Bf16>(sums.half[0]", WRONG),
    "HalvesExchanged": ("runs::kQuad + 2 * half + r % 2;", "runs::kQuad + 2 - 2 * half + r % 2;",
                        WRONG),
    "SignForgotten": ("load_global(pair) ^ sign", "load_global(pair)", WRONG),
    "ScaleForgotten": ("(p_.scale < 0 ? -p_.scale : p_.scale) * kLog2E", "kLog2E", WRONG),
    "FactorsOfAnotherRow": ("load_global(p_.query_factors + first + slot)",
                            "load_global(p_.query_factors + first)", WRONG),
    "FactorsOfAnotherLane": ("from[runs::factor_place({t % 4, k}, u)]",
                             "from[runs::factor_place({0, k}, u)]", WRONG),
    "ColumnNotScaled": ("product *= factor;", "", WRONG),
    "EmptyColumnsCount": ("if (Empties && factor < 0) product = -INFINITY;", "", WRONG),
    "EmptyRowsAreLargest": ("if (Empties && rows[u] < 0) top = -INFINITY;", "", WRONG),
    "EmptyRowsCount": ("Empties && rows[u] < 0 ? 0 : share", "share", WRONG),
    "LargestOfOneRow": ("tops[tile] = max2(tops[tile], top);", "tops[tile] = top;", WRONG),
    "LargestOfOneLane": (
        "neighbour_reduce<Quads>(tops_, [](float a, float b) { return max2(a, b); });", "", WRONG),
    "SumOfOneLane": (
        "neighbour_reduce<Quads>(totals_, [](float a, float b) { return a + b; });", "", WRONG),
    "LargestForgotten": ("(tops[tile] + log2_approx(totals[tile]))",
                         "log2_approx(totals[tile])", WRONG),
    "InPowersOfTwo": ("log2_approx(totals[tile])) * kLn2;", "log2_approx(totals[tile]));", WRONG),
    "RowsPastTheEnd": ("row < p_.rows && column", "row < p_.rows + 1 && column", WRONG),
    "ColumnsPastTheEnd": ("column < p_.columns)", "column < p_.columns + 1)", WRONG),
    "FirstPartAlone": ("finish(Sums& sums, int n) {", "finish(Sums& sums, int n) { n -= n;",
                       "RACE|TOO MANY ARRIVALS|PHASE ALIAS|DEADLOCK|" + WRONG),
    "ColumnsOfTheFirstPart": ("store((work_.first_block + n) * kBlockTiles);",
                              "store(n * kBlockTiles);", WRONG),
    "RowsOfTheFirstConsumer": ("first_row_((work_.row_group * kConsumers + w) * kRowTiles)",
                               "first_row_(work_.row_group * kConsumers * kRowTiles)", WRONG),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    tables = {HEADERS["means"]: {("means",): OF_MEANS}, HEADERS["scores"]: {("scores",): OF_SCORES}}
    folder, problems = tmp_path_factory.mktemp("sub_blocks"), tuple(HEADERS)
    includes = ("kernels/coarse/run_layout.h", "prim/warp.h", "tile/ring.h", "tile/tile.h")
    return Planted(compiler, PROGRAM, folder, tuple(tables), tables, problems, SEEDS, *includes)


def test_numbers_are_right(planted):
    for problem in HEADERS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"


@pytest.mark.parametrize(("problem", "mutants"), [("means", OF_MEANS), ("scores", OF_SCORES)])
def test_mutants_are_reported_by_name(planted, problem, mutants):
    assert not planted.unnoticed(HEADERS[problem])
