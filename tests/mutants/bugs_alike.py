# SPDX-License-Identifier: Apache-2.0
"""Bugs that the two kernels over query tiles, forward and dQ, can have alike.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from mutants.planted_bugs import Bugs

WORK_LEFT = "DEADLOCK|LOADS STILL IN FLIGHT|WRONG NUMBERS|TOO MANY ARRIVALS|PHASE ALIAS"

ALIKE: Bugs = {
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
    "PassedOverByNobody": (
        "s_.rings.acquire_second(slot_, step.flags(),",
        "s_.rings.acquire_second(slot_, ~0u >> 32 - kConsumers,",
        r"DEADLOCK: .*producer\d waits for second_empty",
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
    "BothNotAwaited": (
        "s_.rings.wait_together(stop);",
        "",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "NextNotAwaited": (
        "next = there ? after : stops_.own(after, wait);",
        "next = there ? after : stops_.own(after);",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "FirstNextNotAwaited": (
        "Stop next = stops_.own(stops_.take(), wait);",
        "Stop next = stops_.own(stops_.take());",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "ItemNotEnded": (
        "stops_.end_item();",
        "",
        r"DEADLOCK|(RACE|NEVER WRITTEN): .*stops\[\d\]",
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
ALIKE_IN_RUNS: Bugs = {
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
}
