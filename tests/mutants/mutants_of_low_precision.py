# SPDX-License-Identifier: Apache-2.0
"""Mutants of the forward of int8 and of its softmax, for test_low_precision_forward.py."""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

WRONG = "WRONG NUMBERS in (fine|out|lse)"
COPY = r"RACE: .*bulk load into [kv]\[\d+\]"

IN_FORWARD: MutantTable = {
    # copies of tiles
    "BytesOfTheScaleForgotten": (
        "s_.ring.acquire(number_, load.flags(), kBytes)",
        "s_.ring.acquire(number_, load.flags(), kBytes - kChunkBytes)",
        r"WRONG EXPECT_TX: image_full\[\d+\] use \d+ expects fewer bytes|RACE",
    ),
    "ImageOfAnotherTile": (
        "p_.images + image * kBytes",
        "p_.images + (image + 1) % p_.keys.num_tiles() * kBytes",
        WRONG,
    ),
    "LoadedIntoTheNextStage": (
        "s_.kv[Ring::stage(number_++)]",
        "s_.kv[Ring::stage(++number_)]",
        r"(NEVER WRITTEN|RACE): .*(k|scale)\[\d+\]",
    ),
    # stages
    "ReleasedBeforeWait": (
        "wgmma_wait<0>(out_); s_.ring.release_second(held);",
        "s_.ring.release_second(held); wgmma_wait<0>(out_);",
        COPY,
    ),
    "NeverReleased": (
        "s_.ring.release_second(held);",
        "",
        "DEADLOCK",
    ),
    "ScaleReadAfterRelease": (
        "s_.ring.release_second(held);",
        "s_.ring.release_second(held);"
        " note_read(&s_.kv[held.first().stage].scale, 4, Layout::Any);",
        COPY,
    ),
    "ScaleOfAnotherStage": (
        "const float& scale = s_.kv[step.first().stage].scale;",
        "const float& scale = s_.kv[(step.first().stage + 1) % kStages].scale;",
        rf"(NEVER WRITTEN|RACE): .*(scale|k)\[\d+\]|{WRONG}",
    ),
    "ScoresBeforeTheirTile": (
        "s_.ring.wait_both(step); issue_scores(step);",
        "issue_scores(step); s_.ring.wait_both(step);",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]",
    ),
    # products
    "ScoresNotAwaited": (
        "wgmma_wait<1>(scores_); weigh(next);",
        "weigh(next); wgmma_wait<1>(scores_);",
        "FRAGMENT IN FLIGHT",
    ),
    "OutputNotAwaited": (
        "wgmma_wait<0>(out_);",
        "wgmma_wait<1>(out_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "PackedWhileInFlight": (
        "finish_output(held); softmax_.rescale(out_); add_when_due(); pack_weights();",
        "pack_weights(); finish_output(held); softmax_.rescale(out_); add_when_due();",
        "FRAGMENT IN FLIGHT",
    ),
    "ValuesOfTheNext": (
        "issue_scores(next); issue_output(held);",
        "issue_scores(next); issue_output(next);",
        WRONG,
    ),
    # sums
    "NotRescaled": ("softmax_.rescale(out_); add_when_due();", "add_when_due();", WRONG),
    "AddedBeforeRescaling": (
        "softmax_.rescale(out_); add_when_due();",
        "add_when_due(); softmax_.rescale(out_);",
        WRONG,
    ),
    "TotalForgotten": (
        "if (has_sums()) return;",
        "return;",
        f"NEVER WRITTEN|WRONG SWIZZLE|{WRONG}",
    ),
    "SumsNotBegunAnew": (
        "s_.kv[step.first().stage].v, has_sums()",
        "s_.kv[step.first().stage].v, tiles_ > 0",
        WRONG,
    ),
    "MeanForgotten": (
        "return fma(mean, p_.scale, x) * kLn2;",
        "return x * kLn2 + 0 * mean;",
        "WRONG NUMBERS in lse",
    ),
    "ScalesOfTheMeans": (
        "finish(out, lse, channels(work) + D);",
        "finish(out, lse, channels(work));",
        "WRONG NUMBERS in (fine|out)",
    ),
    # output
    "OutputWithoutFence": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*store to q\[\d\].* TMA store from q",
    ),
    "StoredByAll": ("if (elect_one()) {", "{", "NOT ELECTED"),
    "OutputNotRead": ("bulk_wait_read<0>();", "", r"RACE: .*q\[\d\]"),
}

IN_LONG: MutantTable = {
    "NeverPromoted": (
        "static constexpr int kPeriod = 8;",
        "static constexpr int kPeriod = 1 << 20;",
        WRONG,
    ),
    "PromotedTooSeldom": (
        "static constexpr int kPeriod = 8;",
        "static constexpr int kPeriod = 32;",
        WRONG,
    ),
}

IN_SOFTMAX: MutantTable = {
    "MaximumNotShared": ("quad_reduce(top, max2);", "", WRONG),
    "MaximumForgotten": (
        "zip(max_, top, [](float, float now) { return now; });",
        "",
        WRONG,
    ),
    "MaximumOfSomeColumns": (
        "max3(x[2 * half + 25], x[2 * half + 29], most)",
        "most",
        WRONG,
    ),
    "ScaleForgotten": (
        "zip(top, scale, [](float most, float by) { return most * by; });",
        "",
        WRONG,
    ),
    "TopElsewhere": (
        "return fma(-8, seen, kTopCode);",
        "return fma(-8, seen, kTopCode - 8);",
        "WRONG NUMBERS in lse",
    ),
    "SlopeOfFour": ("return 8 * by;", "return 4 * by;", WRONG),
    "RowsExchanged": (
        "fma(biased_float(x[2 * p]), by[p & 1], start[p & 1])",
        "fma(biased_float(x[2 * p]), by[1 - (p & 1)], start[1 - (p & 1)])",
        WRONG,
    ),
    "SteepNotFlattened": (
        "x > kSteep && x < kSteepest",
        "x > kSteepest",
        WRONG,
    ),
    "FlattenedToTheSlope": (
        "static_cast<int>(nearest(below)); } } by[half] = 1; start[half] = kTopCode;",
        "static_cast<int>(nearest(below)); } } start[half] = kTopCode;",
        WRONG,
    ),
    "FlatRowsKeepTheirStart": (
        "static_cast<int>(nearest(below)); } } by[half] = 1; start[half] = kTopCode;",
        "static_cast<int>(nearest(below)); } } by[half] = 1;",
        WRONG,
    ),
    "RescaledByTheMaximum": (
        "return exp2_approx(seen - now);",
        "return exp2_approx(now - seen);",
        WRONG,
    ),
}

IN_TOTAL: MutantTable = {
    "TotalNotRescaled": (
        "const float by = there ? exp2_approx(row.max[half] - max[half]) : 0;",
        "const float by = 1;",
        WRONG,
    ),
    "SumsOfTheTotalForgotten": (
        "all[half] = fma(row.sum[half], by[half], all[half]);",
        "",
        WRONG,
    ),
    "UnitOfTheTotalForgotten": (
        "const float factor = by[pair & 1] / kUnit;",
        "const float factor = by[pair & 1];",
        WRONG,
    ),
    "RowsExchanged": (
        "all[half] = has_sums ? x[D / 2 + 2 * half] : 0;",
        "all[half] = has_sums ? x[D / 2 + 2 - 2 * half] : 0;",
        WRONG,
    ),
    "FirstAdditionTakenForAnother": (
        "if (there) halves = at;",
        "halves = at; there = true;",
        f"WRONG SWIZZLE|{WRONG}",
    ),
}

IN_QUERIES: MutantTable = {
    "QueriesOfTheOtherHalf": (
        "pair_address(tile, four_row(t, r), four_column(t, r))",
        "pair_address(tile, four_row(t, r), four_column(t, r) ^ 16)",
        WRONG,
    ),
    "ScaleOfTheOtherRow": (
        "const float by = factor[r & 1];",
        "const float by = factor[1 - (r & 1)];",
        WRONG,
    ),
    "MeansOfOtherChannels": (
        "means + four_column(t, r)",
        "means",
        "WRONG NUMBERS in lse",
    ),
    "ScaleOfAQuarterOfTheRow": ("quad_reduce(most, max2);", "", WRONG),
}

# Of e4m3 scores alone.
IN_HALVES: MutantTable = {
    "MaximumOfOneColumn": (
        "row[half] = max2(widen_low<Fp16>(most), widen_high<Fp16>(most));",
        "row[half] = widen_low<Fp16>(most);",
        WRONG,
    ),
    "RowsOfPairsExchanged": (
        "line_codes(x[p], factor[p & 1], first[p & 1])",
        "line_codes(x[p], factor[1 - (p & 1)], first[1 - (p & 1)])",
        WRONG,
    ),
    "FarNotFlattened": (
        "by < kSteepest && (by > kSteepHalves || far > kFarHalves) ? 1 : 0",
        "by < 0 && far < 0 ? 1 : 0",
        WRONG,
    ),
    "FlattenedToZero": (
        "(score - most) * by[half]",
        "score * by[half]",
        WRONG,
    ),
}
