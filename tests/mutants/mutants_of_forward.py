# SPDX-License-Identifier: Apache-2.0
"""Mutants of the forward kernel, for test_forward_kernel.py.

They are written as in mutants_of_query_kernels.py.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable
from mutants.mutants_of_query_kernels import ALIKE, ALIKE_IN_RUNS

UNSEEN = r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS"

IN_FORWARD: MutantTable = {
    **ALIKE,
    # Q
    "BytesOfQueriesForgotten": (
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D * kElementBytes);",
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D);",
        r"WRONG EXPECT_TX: resident_full\[\d\] use \d expects fewer bytes|RACE: .*q\[\d\]",
    ),
    "HeldQueriesForgotten": (
        "if (work.tile >= 0) read_tile(held_queries_, s_.q[w_]);",
        "if (work.tile < 0) read_tile(held_queries_, s_.q[w_]);",
        "WRONG NUMBERS in out",
    ),
    "HeldQueriesOfTheNextConsumer": (
        "read_tile(held_queries_, s_.q[w_]);",
        "read_tile(held_queries_, s_.q[(w_ + 1) % kConsumers]);",
        r"(RACE|NEVER WRITTEN): .*q\[\d\]|WRONG NUMBERS in out",
    ),
    "RestOfQueriesFromTheKeys": (
        "mma_ABt<Element>(scores_, held_queries_, s_.q[w_], k);",
        "mma_ABt<Element>(scores_, held_queries_, k, k);",
        "WRONG NUMBERS in out",
    ),
    # loads, and the barrier that they count on
    "LoadedIntoTheNextStage": (
        "s_.k[Rings::first_stage(number_++)]",
        "s_.k[Rings::first_stage(++number_)]",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]",
    ),
    "LoadedIntoTheStageOfTheOtherRing": (
        "s_.k[Rings::first_stage(number_++)]",
        "s_.k[Rings::second_stage(number_++) % Rings::kFirst]",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]|WRONG NUMBERS",
    ),
    "WrongTensor": (
        "p_.v, &KeySchedule::Origins::second,",
        "p_.k, &KeySchedule::Origins::second,",
        "WRONG NUMBERS in out",
    ),
    # stages released
    "FirstReleasedBeforeWait": (
        "wgmma_wait<1>(scores_); release_first(next);",
        "release_first(next); wgmma_wait<1>(scores_);",
        r"RACE: .*TMA load into k\[\d+\]",
    ),
    "FirstOfARunReleasedBeforeWait": (
        "wgmma_wait<0>(scores_); release_first(step);",
        "release_first(step); wgmma_wait<0>(scores_);",
        r"RACE: .*TMA load into k\[\d+\]",
    ),
    "SecondReleasedBeforeWait": (
        "wgmma_wait<0>(out_); s_.rings.release_second(held); softmax_",
        "s_.rings.release_second(held); wgmma_wait<0>(out_); softmax_",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "LastSecondReleasedBeforeOutput": (
        "issue_output(held); wgmma_wait<0>(out_); s_.rings.release_second(held); held =",
        "s_.rings.release_second(held); issue_output(held); wgmma_wait<0>(out_); held =",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "NextReleasedInsteadOfHeld": (
        "s_.rings.release_second(held); softmax_",
        "s_.rings.release_second(next); softmax_",
        r"RACE: .*TMA load into (k|v)\[\d+\]|TOO MANY ARRIVALS|DEADLOCK|PHASE ALIAS",
    ),
    # loads waited for
    "FirstNotAwaited": ("s_.rings.wait_first(step);", ";", UNSEEN),
    "SecondNotAwaited": ("wait_second(next);", "", UNSEEN),
    "SecondOfARunNotAwaited": ("wait_second(step);", "", UNSEEN),
    "TakenToBeThere": (
        "there = after.is(ConsumerStep::kCompute) && s_.rings.has_first(after);",
        "there = after.is(ConsumerStep::kCompute);",
        UNSEEN,
    ),
    "TileBeforeSeen": ("s_.rings.has_first(after);", "s_.rings.has_first(next);", UNSEEN),
    # products
    "ScoresNotAwaited": ("wgmma_wait<1>(scores_);", "", "FRAGMENT IN FLIGHT: .*an accumulator"),
    "FirstScoresWaitTooShallow": (
        "wgmma_wait<0>(scores_);",
        "wgmma_wait<1>(scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "ProductsInWrongOrder": (
        "issue_scores(next); issue_output(held);",
        "issue_output(held); issue_scores(next);",
        "WGMMA STILL IN FLIGHT",
    ),
    "OutputWaitTooShallow": (
        "wgmma_wait<0>(out_); s_.rings.release_second(held); held",
        "wgmma_wait<1>(out_); s_.rings.release_second(held); held",
        "WGMMA STILL IN FLIGHT",
    ),
    "WeightsOverwritten": (
        "wgmma_wait<0>(out_); s_.rings.release_second(held); softmax_.rescale(out_);"
        " round_to<Element>(weights_, scores_);",
        "round_to<Element>(weights_, scores_); wgmma_wait<0>(out_);"
        " s_.rings.release_second(held); softmax_.rescale(out_);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "RescaledInFlight": (
        "wgmma_wait<0>(out_); s_.rings.release_second(held); softmax_.rescale(out_);",
        "softmax_.rescale(out_); wgmma_wait<0>(out_); s_.rings.release_second(held);",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    # the output leaves
    "OutputNotFenced": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*TMA store from q\[\d\]",
    ),
    # nothing but the numbers tells
    "RowsNotMasked": ("mask_columns(scores_, step.rows);", "", "WRONG NUMBERS in out"),
    "RowsOfTheTileHeld": (
        "release_first(next); weigh(next);",
        "release_first(next); weigh(held);",
        "WRONG NUMBERS in out",
    ),
    "NotRescaled": (
        "s_.rings.release_second(held); softmax_.rescale(out_);",
        "s_.rings.release_second(held);",
        "WRONG NUMBERS in out",
    ),
    "OutputNotZeroed": ("fill(out_, 0.f);", "", "WRONG NUMBERS in out"),
    "SoftmaxNotReset": ("softmax_.reset();", "", "WRONG NUMBERS in out"),
    "LseOfTheNextHead": (
        "int64_t{work.batch} * p_.heads + work.head;",
        "int64_t{work.batch} * p_.heads + (work.head + 1) % p_.heads;",
        "WRONG NUMBERS in lse",
    ),
}

# Found where loads are skipped and flushed.
IN_RUNS_OF_FORWARD: MutantTable = {
    **ALIKE_IN_RUNS,
    "RunNotRescaled": (
        "weigh(step); softmax_.rescale(out_);",
        "weigh(step);",
        "WRONG NUMBERS in out",
    ),
}

IN_GATED_FORWARD: MutantTable = {
    "PlaceOfFineReusedAtOnce": (
        "write(to, at, work); named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "write(to, at, work);",
        r"MISSING NAMED BARRIER .*TMA store from q\[\d\].* store to q\[\d\]",
    ),
    "FineNotWritten": (
        "write(to, at, work); named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "",
        "WRONG NUMBERS in fine",
    ),
    "FineWrittenOverOut": (
        "const TileBox box = box_of(to, p_.queries.stored(at), work.head, work.batch);",
        "const TileBox box = box_of(p_.out, p_.queries.stored(at), work.head, work.batch);",
        "WRONG NUMBERS in fine",
    ),
}
