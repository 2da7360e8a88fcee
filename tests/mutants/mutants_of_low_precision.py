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
        "s_.ring.wait_both(step); issue_scores(keys);",
        "issue_scores(keys); s_.ring.wait_both(step);",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]",
    ),
    # products
    "ScoresNotAwaited": (
        "wgmma_wait<1>(scores_); weigh(scale);",
        "weigh(scale); wgmma_wait<1>(scores_);",
        "FRAGMENT IN FLIGHT",
    ),
    "OutputNotAwaited": (
        "wgmma_wait<0>(out_);",
        "wgmma_wait<1>(out_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "PackedWhileInFlight": (
        "finish_output(held); if (has_sums()) softmax_.rescale(out_);"
        " else add_to_total(softmax_.factor()); pack_weights();",
        "pack_weights(); finish_output(held); if (has_sums()) softmax_.rescale(out_);"
        " else add_to_total(softmax_.factor());",
        "FRAGMENT IN FLIGHT",
    ),
    "ValuesOfTheNext": (
        "issue_scores(keys); issue_output(held_keys);",
        "issue_scores(keys); issue_output(keys);",
        WRONG,
    ),
    # sums
    "NotRescaled": (
        "if (has_sums()) softmax_.rescale(out_); else",
        "if (!has_sums())",
        WRONG,
    ),
    "BegunWithTheLastRunsTiles": ("pack_weights(); tiles_ = 0;", "pack_weights();", WRONG),
    "AddedWithoutRescaling": (
        "add_to_total(softmax_.factor());",
        "add_to_total(ones());",
        WRONG,
    ),
    "TotalForgotten": (
        "else add_to_total(softmax_.factor());",
        "else { }",
        WRONG,
    ),
    "LastTotalForgotten": (
        "add_to_total(ones());",
        "",
        WRONG,
    ),
    "TotalNotCleared": (
        "Total::clear(s_.out(w_), s_.totals[w_]);",
        "",
        f"NEVER WRITTEN|WRONG SWIZZLE|RACE|{WRONG}",
    ),
    "SumsNotBegunAnew": (
        "values_beside(keys), has_sums()",
        "values_beside(keys), tiles_ > 0",
        WRONG,
    ),
    "ValuesOfTheNextStage": (
        "step.first().stage * sizeof(QuantisedTile<D>)",
        "(step.first().stage + 1) % kStages * sizeof(QuantisedTile<D>)",
        rf"(NEVER WRITTEN|RACE): .*[kv]\[\d+\]|{WRONG}",
    ),
    "ScalesOfTheMeans": (
        "p_.scale, channels(work) + D);",
        "p_.scale, channels(work));",
        "WRONG NUMBERS in (fine|out)",
    ),
    # output
    "OutputWithoutFence": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*store to out\[\d\].* TMA store from out",
    ),
    "StoredByAll": ("if (elect_one()) {", "{", "NOT ELECTED"),
    "OutputNotRead": (
        "let_output_leave() { if (elect_one()) bulk_wait_read<0>();",
        "let_output_leave() {",
        r"RACE: .*out\[\d\]",
    ),
    "ClearedWhileItLeaves": (
        "let_output_leave(); Total::clear(",
        "Total::clear(",
        r"RACE: .*out\[\d\]",
    ),
    "NextQueriesOverTheOutput": (
        "work_on(work); if (elect_one()) bulk_wait_read<0>();",
        "work_on(work);",
        r"RACE: .*out\[\d\]",
    ),
}

IN_RESIDENT_TILES: MutantTable = {
    "QueriesReleasedUnread": (
        "read(work); empty[w].arrive_all();",
        "empty[w].arrive_all(); read(work);",
        r"(RACE: |MISSING NAMED BARRIER).*TMA load into q\[\d\]",
    ),
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
        "other = max3(other, x[i + 4], x[i + 5]);",
        "other = max3(other, x[i + 4], other);",
        WRONG,
    ),
    "ScaleForgotten": (
        "zip(top, scale, [](float most, float by) { return most * by; });",
        "",
        WRONG,
    ),
    "TopElsewhere": (
        "return fma(-8 * unit, seen, kTopCode * unit);",
        "return fma(-8 * unit, seen, (kTopCode - 8) * unit);",
        "WRONG NUMBERS in lse",
    ),
    "SlopeOfFour": ("return 8 * unit * by;", "return 4 * unit * by;", WRONG),
    "RowsExchanged": (
        "fma(float_of(x[2 * p]), by[p & 1], start[p & 1])",
        "fma(float_of(x[2 * p]), by[1 - (p & 1)], start[1 - (p & 1)])",
        WRONG,
    ),
    "SteepNotFlattened": (
        "if (!(step > kSteep && step < kSteepest)) continue;",
        "continue;",
        WRONG,
    ),
    "FlattenedToTheSlope": (
        "by[half] = kCodeUnit; start[half] = kTopCode * kCodeUnit;",
        "start[half] = kTopCode * kCodeUnit;",
        WRONG,
    ),
    "FlatRowsKeepTheirStart": (
        "by[half] = kCodeUnit; start[half] = kTopCode * kCodeUnit;",
        "by[half] = kCodeUnit;",
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
        "const float by = exp2_approx(number(row, 2 + half) - max[half]);",
        "const float by = 1;",
        WRONG,
    ),
    "SumsOfTheTotalForgotten": (
        "fma(number(row, half), by, sum)",
        "sum",
        WRONG,
    ),
    "UnitOfTheTotalForgotten": (
        "to[2 * pair] = widen_low<Fp16>(halves.pairs[j]) / kUnit;",
        "to[2 * pair] = widen_low<Fp16>(halves.pairs[j]);",
        WRONG,
    ),
    "RowsExchanged": (
        "const float sum = x[D / 2 + 2 * half] * own[half];",
        "const float sum = x[D / 2 + 2 - 2 * half] * own[half];",
        WRONG,
    ),
    "OutputNotRescaled": (
        "const float unit[2] = {own[0] * kUnit, own[1] * kUnit};",
        "const float unit[2] = {kUnit, kUnit};",
        WRONG,
    ),
    "MaximaOfTheFirstAddition": (
        "row.pairs[2 + half] = static_cast<uint32_t>(float_bits(max[half]));",
        "row.pairs[2 + half] = static_cast<uint32_t>(float_bits(0));",
        WRONG,
    ),
    "HalvesExchanged": (
        "to[2 * pair + 1] = widen_high<Fp16>(halves.pairs[j]) / kUnit;",
        "to[2 * pair + 1] = widen_low<Fp16>(halves.pairs[j]) / kUnit;",
        WRONG,
    ),
    "MeanForgotten": (
        "return fma(mean, scale_of_scores, x) * kLn2;",
        "return x * kLn2 + 0 * mean;",
        "WRONG NUMBERS in lse",
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

# Of e4m3 alone.
IN_QUERIES_OF_FP8: MutantTable = {
    "ProductNotKept": ("zip(scale, own,", "zip(own, scale,", "WRONG NUMBERS in lse"),
    "ProductOfTheOtherRow": (
        "got[r & 1] = fma(x[c], codes[c], got[r & 1]);",
        "got[1 - (r & 1)] = fma(x[c], codes[c], got[1 - (r & 1)]);",
        WRONG,
    ),
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
        "if (!((by[half] > kSteepHalves || is_far(seen[half])) && by[half] < kSteepest)) continue;",
        "continue;",
        WRONG,
    ),
    "FlattenedToZero": (
        "(score - most) * by[half]",
        "score * by[half]",
        WRONG,
    ),
}
