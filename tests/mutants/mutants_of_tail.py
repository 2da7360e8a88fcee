# SPDX-License-Identifier: Apache-2.0
"""Mutants of the tail's kernels, for test_tail_kernels.py."""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

WRONG = "WRONG NUMBERS"
UNSEEN = r"(RACE|NEVER WRITTEN): .*(mean_[kv]|mean_k_low|bias)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS"
IN_FLIGHT = "FRAGMENT IN FLIGHT: .*an accumulator"

# The two kernels over query tiles.
ALIKE: MutantTable = {
    "BytesOfOneTileForgotten": (
        "full.arrive_expect_tx(2 * p.queries.box_rows(at)",
        "full.arrive_expect_tx(1 * p.queries.box_rows(at)",
        r"WRONG EXPECT_TX: resident_full\[\d\]|RACE: .*(q|out|grad_out)\[\d\]",
    ),
    "ChunksNotGivenBack": (
        "s_.ring.wait(held_); s_.ring.release(held_);",
        "s_.ring.wait(held_);",
        "DEADLOCK",
    ),
    "FirstChunkNotAwaited": ("wait_to(ahead, held_ + 1);", "", UNSEEN),
    "SecondChunkNotAwaited": (
        "wait_to(ahead, held_ + 2 < end ? held_ + 2 : end);",
        "ahead = held_ + 2 < end ? held_ + 2 : end;",
        UNSEEN,
    ),
    "NextChunkNotAwaited": (
        "wait_to(ahead, held_ + 3 < end ? held_ + 3 : end);",
        "ahead = held_ + 3 < end ? held_ + 3 : end;",
        UNSEEN,
    ),
    "MaskOfTheChunkBefore": ("row, chunk);", "row, chunk - 1);", WRONG),
    "SizesForgotten": ("return fma(x, scale, bias);", "return x * scale;", WRONG),
    "NotMasked": ("mask_columns(scores_, left_out);", "", WRONG),
    "NotFencedBeforeStores": (
        "fence_async_proxy(); named_sync",
        "named_sync",
        r"MISSING PROXY FENCE .*q\[\d\]",
    ),
    "WarpsNotMetBeforeStores": (
        "named_sync(consumer_barrier(w_), kWarpgroupThreads); if (elect_one()) {",
        "if (elect_one()) {",
        r"MISSING NAMED BARRIER .*q\[\d\]",
    ),
    "StoresNotAwaited": (
        "bulk_commit(); bulk_wait_read<0>();",
        "bulk_commit();",
        r"RACE: .*q\[\d\]",
    ),
    "ChunkHeldForGood": ("s_.ring.release(held_++);", "held_++;", "DEADLOCK"),
}

IN_FORWARD: MutantTable = {
    **ALIKE,
    "ChunksPassUnseen": (
        "s_.ring.wait(held_); s_.ring.release(held_);",
        "s_.ring.release(held_);",
        rf"{UNSEEN}|WRONG EXPECT_TX",
    ),
    "EndOfOutNotZeroed": (
        "zero_tail(s.out[w], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .*out\[\d\]",
    ),
    "EndOfQueriesNotFenced": (
        "thread, threads); } fence_async_proxy();",
        "thread, threads); }",
        r"MISSING PROXY FENCE .*q\[\d\]",
    ),
    "FineStageForgotten": ("softmax_.resume(lse);", "softmax_.reset();", WRONG),
    "NaturalLogarithm": ("from[token] * Softmax::kLog2e", "from[token]", WRONG),
    "FirstScoresNotAwaited": ("wgmma_wait<0>(scores_);", "", IN_FLIGHT),
    "ScoresNotAwaited": ("wgmma_wait<1>(scores_);", "", IN_FLIGHT),
    "ReleasedBeforeOutput": (
        "wgmma_wait<0>(out_); s_.ring.release(held_); softmax_",
        "s_.ring.release(held_); wgmma_wait<0>(out_); softmax_",
        r"RACE: .*TMA load into mean_v\[\d\]",
    ),
    "LastReleasedBeforeOutput": (
        "issue_output(held_); wgmma_wait<0>(out_); s_.ring.release(held_++);",
        "s_.ring.release(held_); issue_output(held_); wgmma_wait<0>(out_); ++held_;",
        r"RACE: .*TMA load into mean_v\[\d\]",
    ),
    "FirstNotRescaled": (
        "weigh(held_, left_out); softmax_.rescale(out_);",
        "weigh(held_, left_out);",
        WRONG,
    ),
    "NotRescaled": (
        "s_.ring.release(held_); softmax_.rescale(out_);",
        "s_.ring.release(held_);",
        WRONG,
    ),
    "WeightsOfTheChunkBefore": (
        "softmax_.rescale(out_); round_to<Element>(weights_, scores_); } issue_output",
        "softmax_.rescale(out_); } issue_output",
        WRONG,
    ),
    "LowForgotten": ("s_.ring.k(n), true);", "s_.ring.k(n), false);", WRONG),
    "HighForgotten": (
        "mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k(n), true);",
        "",
        WRONG,
    ),
    "LseNotStored": ("if (token >= 0) to[token] = x;", "", WRONG),
}

IN_GATED_FORWARD: MutantTable = {
    "PlaceNotFree": (
        "write(to, at, work); named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "write(to, at, work);",
        r"MISSING NAMED BARRIER .*q\[\d\]|RACE: .*q\[\d\]",
    ),
}

IN_QUERIES: MutantTable = {
    **ALIKE,
    "EndOfGradientNotZeroed": (
        "zero_tail(s.grad_out[w], rows, thread, threads);",
        "",
        r"NEVER WRITTEN: .*grad_out\[\d\]",
    ),
    "FirstScoresNotAwaited": ("wgmma_wait<0>(scores_, grad_scores_);", "", IN_FLIGHT),
    "ScoresNotAwaited": ("wgmma_wait<1>(scores_, grad_scores_);", "", IN_FLIGHT),
    "ReleasedBeforeGradient": (
        "wgmma_wait<0>(grad_q_); s_.ring.release(held_); round_to",
        "s_.ring.release(held_); wgmma_wait<0>(grad_q_); round_to",
        r"RACE: .*TMA load into mean_k\[\d\]",
    ),
    "LastReleasedBeforeGradient": (
        "issue_gradient(held_); wgmma_wait<0>(grad_q_); s_.ring.release(held_++);",
        "s_.ring.release(held_); issue_gradient(held_); wgmma_wait<0>(grad_q_); ++held_;",
        r"RACE: .*TMA load into mean_k\[\d\]",
    ),
    "GradientNotZeroed": ("fill(grad_q_, 0.f);", "", WRONG),
    "LseForgotten": ("return exp2_approx(x - lse);", "return exp2_approx(x);", WRONG),
    "DeltaForgotten": ("return x - delta;", "return x;", WRONG),
    "WeightsForgotten": ("return x * weight;", "return x;", WRONG),
    "FineStageForgotten": (
        "x[i] = fma(x[i], scale, widen_low<Element>(pair));",
        "x[i] *= scale;",
        WRONG,
    ),
    "NotScaled": (
        "x[i + 1] = fma(x[i + 1], scale, widen_high<Element>(pair));",
        "x[i + 1] += widen_high<Element>(pair);",
        WRONG,
    ),
    "HighForgotten": (
        "mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k(n), true);",
        "",
        WRONG,
    ),
    "HighOfRegistersForgotten": (
        "mma_ABt<Element>(scores_, q_, s_.ring.k(n), true);",
        "",
        WRONG,
    ),
}

IN_CHUNKS: MutantTable = {
    "BytesOfLowForgotten": (
        "arrive_expect_tx(kBytes);",
        "arrive_expect_tx(kBytes - static_cast<int>(sizeof(Tile<D>)));",
        r"WRONG EXPECT_TX: tail_full\[\d\]|RACE: .*mean",
    ),
    "StageNotFree": ("empty[at].wait(Ring<Stages>::use(n) - 1);", "", r"RACE: .*TMA load into|TOO"),
    "WaitsForTheNextUse": (
        "empty[at].wait(Ring<Stages>::use(n) - 1);",
        "empty[at].wait(Ring<Stages>::use(n));",
        "DEADLOCK",
    ),
    "OneConsumerIsEnough": (
        "Consumers * kWarpgroupThreads",
        "kWarpgroupThreads",
        "TOO MANY ARRIVALS|RACE: .*mean|PHASE ALIAS",
    ),
    "KeysAreLow": ("load(ks[at], keys.k);", "load(ks[at], keys.k_low);", WRONG),
    "ValuesAreKeys": ("load(vs[at], keys.v);", "load(vs[at], keys.k);", WRONG),
    "SizesOfTheFirstChunk": ("keys.bias + chunk * kTileRows", "keys.bias", WRONG),
    "FirstChunkAlways": (
        "return {head * x.channels_per_head, chunk * kTileRows,",
        "return {head * x.channels_per_head, 0 * kTileRows,",
        WRONG,
    ),
    "ChosenTilesToo": ("return ~chosen &", "return ~uint64_t{0} &", WRONG),
    "HighWordForgotten": ("high << kWordBits | low", "low", WRONG),
    "HighWordIsLow": ("load_global(row + first + 1)", "load_global(row + first)", WRONG),
    "WorkDoneTwice": ("index += block_count()", "index += 1", WRONG),
    "LastGroupForgotten": (
        "groups(ceil_div(queries.num_tiles() - first, Consumers))",
        "groups((queries.num_tiles() - first) / Consumers)",
        WRONG,
    ),
}

IN_MEANS: MutantTable = {
    "BytesOfLowForgotten": (
        "full.arrive_expect_tx(3 * static_cast<int>(sizeof(Tile<D>)));",
        "full.arrive_expect_tx(2 * static_cast<int>(sizeof(Tile<D>)));",
        r"WRONG EXPECT_TX: own_full\[\d\]|RACE: .*mean_",
    ),
    "BytesOfStatsForgotten": (
        "D * kElementBytes + static_cast<int>(sizeof(RowStats))",
        "D * kElementBytes",
        r"WRONG EXPECT_TX: query_full\[\d\]|RACE: .*stats",
    ),
    "MeansNotAwaited": (
        "s_.own_full[w_].wait(round);",
        "",
        r"(RACE|NEVER WRITTEN): .*mean_|PHASE ALIAS|LOADS STILL IN FLIGHT",
    ),
    "PlaceOfMeansNotFree": ("s.own_empty[w].wait(round - 1);", "", r"RACE: .*mean_|TOO MANY"),
    "MeansGivenBackBefore": (
        "fill(grad_v_, 0.f); if",
        "fill(grad_v_, 0.f); s_.own_empty[w_].arrive_all(); if",
        r"RACE: .*mean_|TOO MANY ARRIVALS",
    ),
    "StageNotFree": (
        "s.empty[stage].wait(Ring<kStages>::use(n) - 1);",
        "",
        r"RACE: .*TMA load into|TOO MANY|RACE: .*(q|grad_out|stats)\[",
    ),
    "EndOfQueriesNotZeroed": (
        "zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .*q\[\d+\]",
    ),
    "QueriesPassUnseen": (
        "wait(held_); release(held_);",
        "release(held_);",
        r"WRONG EXPECT_TX|RACE|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "FirstQueryNotAwaited": (
        "wait(held_); issue_scores(held_);",
        "issue_scores(held_);",
        r"(RACE|NEVER WRITTEN): .*(q|stats|grad_out)\[\d+\]|PHASE ALIAS",
    ),
    "NextQueryNotAwaited": (
        "wait(held_ + 1);",
        "",
        r"(RACE|NEVER WRITTEN): .*(q|stats|grad_out)\[\d+\]|PHASE ALIAS",
    ),
    "FirstScoresNotAwaited": ("wgmma_wait<0>(scores_);", "", IN_FLIGHT),
    "ScoresNotAwaited": ("wgmma_wait<1>(scores_);", "", IN_FLIGHT),
    "ReleasedBeforeGradient": (
        "wgmma_wait<0>(grad_k_); release(held_); differentiate",
        "release(held_); wgmma_wait<0>(grad_k_); differentiate",
        r"RACE: .*TMA load into q\[\d+\]",
    ),
    "LastReleasedBeforeGradient": (
        "issue_grad_k(held_); wgmma_wait<0>(grad_k_); release(held_++);",
        "release(held_); issue_grad_k(held_); wgmma_wait<0>(grad_k_); ++held_;",
        r"RACE: .*TMA load into q\[\d+\]",
    ),
    "GradientsOfWeightsNotAwaited": ("wgmma_wait<1>(grad_scores_);", "", IN_FLIGHT),
    "ValuesNotAwaited": (
        "wgmma_wait<0>(grad_v_);",
        "",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "KeysNotZeroed": ("fill(grad_k_, 0.f);", "", WRONG),
    "ValuesNotZeroed": ("fill(grad_v_, 0.f);", "", WRONG),
    "NotMasked": (
        "left_out >> row & 1 ? 0.f : -INFINITY",
        "left_out >> row & 1 ? 0.f : 0.f",
        WRONG,
    ),
    "MaskOfTheTileBefore": (
        "mask(bias, of_keys, place);",
        "mask(bias, of_keys, place - 1);",
        WRONG,
    ),
    "SizesForgotten": ("return masked + size;", "return masked;", WRONG),
    "BiasForgotten": ("return fma(x, scale, b);", "return x * scale;", WRONG),
    "LseForgotten": ("return exp2_approx(x - lse);", "return exp2_approx(x);", WRONG),
    "DeltaForgotten": ("return x - delta;", "return x;", WRONG),
    "WeightsForgotten": ("return x * weight;", "return x;", WRONG),
    "HighForgotten": (
        "mma_ABt<Element>(scores_, s_.k[no_hoist(w_)], s_.q[stage(n)], true);",
        "",
        WRONG,
    ),
    "KeysAreLow": ("load(s.k[w], p.tail.k);", "load(s.k[w], p.tail.k_low);", WRONG),
    "OneHeadAlways": (
        "p.kv_heads * sharing + place / tiles",
        "p.kv_heads * sharing + 0 * place",
        WRONG,
    ),
    "SplitsOverlap": (
        "all * split / p.splits",
        "all * split / (p.splits + 1)",
        WRONG,
    ),
    "EndsOverlap": (
        "all * (split + 1) / p.splits",
        "all * (split + 1) / (p.splits + 1)",
        WRONG,
    ),
    "SplitsInOnePlace": ("group.split * 2 * matrices", "0 * matrices", WRONG),
    "ValuesInThePlaceOfKeys": ("store(grad_v_, of_k + matrices);", "store(grad_v_, of_k);", WRONG),
    "RowsPastTheEnd": ("if (row < tiles)", "if (row < tiles + 1)", WRONG),
    "LastChunkForgotten": (
        "groups(ceil_div(chunks, kConsumers))",
        "groups(chunks / kConsumers)",
        WRONG,
    ),
}
