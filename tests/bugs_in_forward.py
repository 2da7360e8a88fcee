# SPDX-License-Identifier: Apache-2.0
"""Bugs in the forward kernel, for test_forward_bugs.py.

Each is what the text is that the header has once, what becomes of it, and how that must be
reported. Spaces stand for any white space. Where a bug has several effects, the schedule decides
which comes first.
"""

from __future__ import annotations

from bugs_in_queries import WORK_LEFT
from planted_bugs import Bugs

UNSEEN = r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS"

IN_FORWARD: Bugs = {
    # Q
    "BytesOfQueriesForgotten": (
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D * 2);",
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D);",
        r"WRONG EXPECT_TX: own_full\[\d\] use \d expects fewer bytes|RACE: .*q\[\d\]",
    ),
    # producers
    "TwoProducers": (
        "kProducers = 3;",
        "kProducers = 2;",
        r"DEADLOCK: .*consumer\d waits for (both|second)_full",
    ),
    "PlanOfOneProducer": (
        "s.plan.init(kProducers);",
        "s.plan.init(1);",
        "TOO MANY ARRIVALS on plan_empty|RACE: .*planner: store to",
    ),
    "StepReadOfTheNextChunk": (
        "const PlanStep step = s_.plan.step(n, i); const TilePlace at = step.place(p_.keys);"
        " Mbarrier& full = s_.rings.acquire_first",
        "const PlanStep step = s_.plan.step(n + 1, i); const TilePlace at = step.place(p_.keys);"
        " Mbarrier& full = s_.rings.acquire_first",
        r"(RACE|NEVER WRITTEN): .*steps",
    ),
    # slots, and the barrier that what comes into them counts on
    "SlotExpectsWholeTiles": (
        "s_.rings.acquire_first(slot_, step.flags(), p_.keys.box_rows(at) * D * 2);",
        "s_.rings.acquire_first(slot_, step.flags(), kTileRows * D * 2);",
        r"WRONG EXPECT_TX: (both|first)_full\[\d+\] use \d still expects \d+ bytes",
    ),
    "FirstTakenFromTheSecondRing": (
        "s_.rings.acquire_first(",
        "s_.rings.acquire_second(",
        r"DEADLOCK|TOO MANY ARRIVALS|RACE|PHASE ALIAS|WRONG EXPECT_TX",
    ),
    "LoadedIntoTheNextStage": (
        "s_.k[Rings::first_stage(slot_++)]",
        "s_.k[Rings::first_stage(++slot_)]",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]",
    ),
    "LoadedIntoTheStageOfTheOtherRing": (
        "s_.k[Rings::first_stage(slot_++)]",
        "s_.k[Rings::second_stage(slot_++) % Rings::kFirst]",
        r"(NEVER WRITTEN|RACE): .*k\[\d+\]|WRONG NUMBERS",
    ),
    "PassedOverByNobody": (
        "s_.rings.acquire_second(slot_, step.flags(),",
        "s_.rings.acquire_second(slot_, ~0u >> 32 - kConsumers,",
        r"DEADLOCK: .*producer\d waits for second_empty",
    ),
    "WrongTensor": (
        "p_.v, &KeyPlan::Origins::second,",
        "p_.k, &KeyPlan::Origins::second,",
        "WRONG NUMBERS in out",
    ),
    # slots given back
    "FirstReleasedBeforeWait": (
        "wgmma_wait<1>(scores_); s_.rings.release_first(next);",
        "s_.rings.release_first(next); wgmma_wait<1>(scores_);",
        r"RACE: .*TMA load into k\[\d+\]",
    ),
    "FirstOfARunReleasedBeforeWait": (
        "wgmma_wait<0>(scores_); s_.rings.release_first(stop);",
        "s_.rings.release_first(stop); wgmma_wait<0>(scores_);",
        r"RACE: .*TMA load into k\[\d+\]",
    ),
    "FirstNotReleased": (
        "s_.rings.release_first(next);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "FirstOfARunNotReleased": (
        "s_.rings.release_first(stop);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
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
    "LastSecondNotReleased": (
        "s_.rings.release_second(held); held = stops_",
        "held = stops_",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "LastSecondReleasedTwice": (
        "s_.rings.release_second(held); held = stops_",
        "s_.rings.release_second(held); s_.rings.release_second(held); held = stops_",
        r"TOO MANY ARRIVALS on (both|second)_empty|RACE|PHASE ALIAS",
    ),
    # slots waited for
    "FirstNotAwaited": ("s_.rings.wait_first(stop);", "", UNSEEN),
    "SecondNotAwaited": ("s_.rings.wait_second(next);", "", UNSEEN),
    "SecondOfARunNotAwaited": ("s_.rings.wait_second(stop);", "", UNSEEN),
    "BothNotAwaited": ("s_.rings.wait_together(stop);", "", UNSEEN),
    "NextNotAwaited": (
        "next = there ? after : stops_.own(after, wait);",
        "next = there ? after : stops_.own(after);",
        UNSEEN,
    ),
    "FirstNextNotAwaited": (
        "Stop next = stops_.own(stops_.take(), wait);",
        "Stop next = stops_.own(stops_.take());",
        UNSEEN,
    ),
    "TakenToBeThere": (
        "there = after.is(Stop::kOwn) && s_.rings.has_first(after);",
        "there = after.is(Stop::kOwn);",
        UNSEEN,
    ),
    "TileBeforeSeen": ("s_.rings.has_first(after);", "s_.rings.has_first(next);", UNSEEN),
    "ItemNotEnded": (
        "stops_.end_item();",
        "",
        r"DEADLOCK|(RACE|NEVER WRITTEN): .*stops\[\d\]",
    ),
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
    "WarpsDoNotMeet": (
        "named_sync(1 + w_, kWarpgroupThreads);",
        "",
        r"MISSING NAMED BARRIER .*TMA store from q\[\d\]",
    ),
    "StoreNotRead": (
        "bulk_wait_read<0>();",
        "",
        r"RACE: .*TMA load into q\[\d\].* not ordered after .*TMA store from",
    ),
    # nothing but the numbers tells
    "RowsNotMasked": ("mask_columns(scores_, stop.rows);", "", "WRONG NUMBERS in out"),
    "RowsOfTheTileHeld": (
        "s_.rings.release_first(next); weigh(next);",
        "s_.rings.release_first(next); weigh(held);",
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
        "int64_t{item.batch} * p_.heads + item.head;",
        "int64_t{item.batch} * p_.heads + (item.head + 1) % p_.heads;",
        "WRONG NUMBERS in lse",
    ),
    # rows of a tile that no load brings
    "TailOfQNotZeroed": (
        "zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* q\[\d+\]",
    ),
    "TailOfKNotZeroed": (
        "zero_tail(s.k[i], p.keys.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* k\[\d+\]",
    ),
    "TailOfVNotZeroed": (
        "zero_tail(s.v[i], p.keys.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* v\[\d+\]",
    ),
    "TailsNotFenced": (
        "fence_async_proxy(); }",
        "}",
        r"MISSING PROXY FENCE between \[prologue: store to",
    ),
}

# Found where slots are passed over and drained.
IN_RUNS_OF_FORWARD: Bugs = {
    "PageNotTurnedBehindTheScores": (
        "after = stops_.turned(after);",
        "if (after.is(Stop::kPage)) after = Stop::of(Stop::kEnd);",
        WORK_LEFT,
    ),
    "NextRunTakenTwice": (
        "held = stops_.next_run(next);",
        "held = stops_.next_run(next); if (held.is(Stop::kOwn)) held = stops_.take();",
        WORK_LEFT,
    ),
    "RunNotRescaled": (
        "weigh(stop); softmax_.rescale(out_);",
        "weigh(stop);",
        "WRONG NUMBERS in out",
    ),
}
