# SPDX-License-Identifier: Apache-2.0
"""Mutants that the two kernels over query tiles, forward and dQ, can have alike.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

WORK_LEFT = "DEADLOCK|LOADS STILL IN FLIGHT|WRONG NUMBERS|TOO MANY ARRIVALS|PHASE ALIAS"

ALIKE: MutantTable = {
    "TwoProducers": (
        "Producer, kProducers }",
        "Producer, kProducers = 2 }",
        r"DEADLOCK: .*consumer\d waits for (both|second)_full",
    ),
    "ScheduleOfOneProducer": (
        "s.schedule.init(kProducers);",
        "s.schedule.init(1);",
        "TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    "LoadReadOfTheNextChunk": (
        "const TileLoad load = s_.schedule.tile_load(n, i); const TilePlace at ="
        " load.place(p_.keys);"
        " Mbarrier& full = s_.rings.acquire_first",
        "const TileLoad load = s_.schedule.tile_load(n + 1, i); const TilePlace at ="
        " load.place(p_.keys);"
        " Mbarrier& full = s_.rings.acquire_first",
        r"(RACE|NEVER WRITTEN): .*loads",
    ),
    "LoadExpectsWholeTiles": (
        "s_.rings.acquire_first(number_, load.flags(), p_.keys.box_rows(at) * D * kElementBytes);",
        "s_.rings.acquire_first(number_, load.flags(), kTileRows * D * kElementBytes);",
        r"WRONG EXPECT_TX: (both|first)_full\[\d+\] use \d still expects \d+ bytes",
    ),
    "FirstTakenFromTheSecondRing": (
        "s_.rings.acquire_first(",
        "s_.rings.acquire_second(",
        r"DEADLOCK|TOO MANY ARRIVALS|RACE|PHASE ALIAS|WRONG EXPECT_TX",
    ),
    "SkippedByNobody": (
        "s_.rings.acquire_second(number_, load.flags(),",
        "s_.rings.acquire_second(number_, ~0u >> 32 - kConsumers,",
        r"DEADLOCK: .*producer\d waits for second_empty",
    ),
    "FirstNotReleased": (
        "release_first(next);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "FirstOfARunNotReleased": (
        "release_first(step);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "BothReleasedWithTheFirst": (
        "if constexpr (!Rings::kTogether) s_.rings.release_first(at);",
        "if constexpr (Rings::kTogether) s_.rings.release_second(at);"
        " else s_.rings.release_first(at);",
        r"TOO MANY ARRIVALS on both_empty|PHASE ALIAS|RACE: .*TMA load into",
    ),
    "LastSecondNotReleased": (
        "s_.rings.release_second(held); held = steps_",
        "held = steps_",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "LastSecondReleasedTwice": (
        "s_.rings.release_second(held); held = steps_",
        "s_.rings.release_second(held); s_.rings.release_second(held); held = steps_",
        r"TOO MANY ARRIVALS on (both|second)_empty|RACE|PHASE ALIAS",
    ),
    "BothNotAwaited": (
        "s_.rings.wait_both(step);",
        ";",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "NextNotAwaited": (
        "next = there ? after : steps_.next_compute(after, wait);",
        "next = there ? after : steps_.next_compute(after);",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "FirstNextNotAwaited": (
        "ConsumerStep next = steps_.next_compute(steps_.take(), wait);",
        "ConsumerStep next = steps_.next_compute(steps_.take());",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "WorkTileNotEnded": (
        "steps_.end_work_tile();",
        "",
        r"DEADLOCK|(RACE|NEVER WRITTEN): .*steps\[\d\]",
    ),
    "WarpsDoNotMeet": (
        "fence_async_proxy(); named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "fence_async_proxy();",
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

# Found where loads are skipped and flushed.
ALIKE_IN_RUNS: MutantTable = {
    "NextChunkNotEnteredBehindTheScores": (
        "after = steps_.past_chunk_end(after);",
        "if (after.is(ConsumerStep::kNextChunk)) after = ConsumerStep::of(ConsumerStep::kDone);",
        WORK_LEFT,
    ),
    "NextRunTakenTwice": (
        "held = steps_.resume(next);",
        "held = steps_.resume(next); if (held.is(ConsumerStep::kCompute)) held = steps_.take();",
        WORK_LEFT,
    ),
}
