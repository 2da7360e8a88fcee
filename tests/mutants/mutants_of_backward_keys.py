# SPDX-License-Identifier: Apache-2.0
"""Mutants in the backward's pass over key tiles, for test_backward_kernels.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

WORK_LEFT = "DEADLOCK|LOADS STILL IN FLIGHT|WRONG NUMBERS|TOO MANY ARRIVALS|PHASE ALIAS"

IN_KEYS: MutantTable = {
    # K and V
    "KvExpectsWholeTiles": (
        "2 * p_.keys.box_rows(at) * D * kElementBytes",
        "2 * kTileRows * D * kElementBytes",
        r"WRONG EXPECT_TX: resident_full\[\d\] use \d still expects 1024 bytes",
    ),
    # producers
    "TwoProducers": (
        "Producer, kProducers }",
        "Producer, kProducers = 2 }",
        r"DEADLOCK: .*consumer\d waits for (both|second)_full",
    ),
    "ScheduleOfTwoProducers": (
        "s.schedule.init(kProducers, kComputing);",
        "s.schedule.init(kProducers - 1, kComputing);",
        "TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    # loads, and the barrier that they count on
    "StatBytesForgotten": (
        "box_rows(at) * D * kElementBytes + kStatBytes;",
        "box_rows(at) * D * kElementBytes;",
        r"WRONG EXPECT_TX: (both|first|second)_full\[\d+\] use \d expects fewer bytes",
    ),
    "DeltaOnWrongBarrier": (
        "stats(n, i).delta, kStatBytes, full);",
        "stats(n, i).delta, kStatBytes, s_.resident.full[0]);",
        r"WRONG EXPECT_TX: (resident_full\[0\]|(both|first)_full\[\d+\] use \d still expects 256"
        r" bytes)",
    ),
    "LseNotLoaded": (
        "bulk_load(s_.lse[stage],",
        "if (false) bulk_load(s_.lse[stage],",
        r"WRONG EXPECT_TX: (both|second)_full\[\d+\] use \d still expects 256 bytes",
    ),
    "LseInWrongStage": (
        "bulk_load(s_.lse[stage],",
        "bulk_load(s_.lse[0],",
        r"(RACE|NEVER WRITTEN): .*lse\[\d+\]",
    ),
    "DeltaInTheStageOfQ": (
        "bulk_load(s_.delta[stage],",
        "bulk_load(s_.delta[Rings::second_stage(number_ - 1) % Rings::kFirst],",
        r"(RACE|NEVER WRITTEN): .*delta\[\d+\]|WRONG NUMBERS",
    ),
    "LoadedIntoTheNextStage": (
        "const int stage = Rings::first_stage(number_++);",
        "const int stage = Rings::first_stage(++number_);",
        r"(NEVER WRITTEN|RACE): .*(grad_out|delta)\[\d+\]",
    ),
    "SkippedByNobody": (
        "s_.rings.acquire_second(number_, load.flags(),",
        "s_.rings.acquire_second(number_, ~0u >> 32 - kConsumers,",
        r"DEADLOCK: .*producer\d waits for second_empty",
    ),
    # loads waited for
    "FirstOfARunNotAwaited": (
        "wait_first(held);",
        "",
        r"(RACE|NEVER WRITTEN): .*(grad_out|delta)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "FirstNotAwaited": (
        "wait_first(next);",
        "",
        r"(RACE|NEVER WRITTEN): .*(grad_out|delta)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "SecondNotAwaited": (
        "s_.rings.wait_second(step);",
        ";",
        r"(RACE|NEVER WRITTEN): .*(q|lse)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "BothNotAwaited": (
        "s_.rings.wait_both(step);",
        ";",
        r"(RACE|NEVER WRITTEN): |TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "QueriesOfARunNotAwaited": (
        "wait_queries(held);",
        "",
        r"(RACE|NEVER WRITTEN): |TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "NextNotAwaited": (
        "next = there ? after : steps_.next_compute(after, wait);",
        "next = there ? after : steps_.next_compute(after);",
        r"(RACE|NEVER WRITTEN): |TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "FirstNextNotAwaited": (
        "ConsumerStep next = steps_.next_compute(steps_.take(), wait);",
        "ConsumerStep next = steps_.next_compute(steps_.take());",
        r"(RACE|NEVER WRITTEN): |TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "TakenToBeThere": (
        "there = after.is(ConsumerStep::kCompute) && s_.rings.has_second(after);",
        "there = after.is(ConsumerStep::kCompute);",
        r"(RACE|NEVER WRITTEN): .*(q|lse)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "TileBeforeSeen": (
        "s_.rings.has_second(after);",
        "s_.rings.has_second(next);",
        r"(RACE|NEVER WRITTEN): .*(q|lse)\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    # stages released
    "FirstReleasedBeforeWait": (
        "wgmma_wait<0>(grad_v_); release_first(step);",
        "release_first(step); wgmma_wait<0>(grad_v_);",
        r"RACE: .*TMA load into grad_out\[\d+\]",
    ),
    "FirstNotReleased": (
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
    "SecondReleasedBeforeWait": (
        "wgmma_wait<0>(grad_k_); s_.rings.release_second(held); const bool there =",
        "s_.rings.release_second(held); wgmma_wait<0>(grad_k_); const bool there =",
        r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
    ),
    "LastSecondReleasedBeforeWait": (
        "wgmma_wait<0>(grad_k_); s_.rings.release_second(held); held = steps_",
        "s_.rings.release_second(held); wgmma_wait<0>(grad_k_); held = steps_",
        r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
    ),
    "SecondNotReleased": (
        "s_.rings.release_second(held); const bool there =",
        "const bool there =",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "LastSecondNotReleased": (
        "s_.rings.release_second(held); held = steps_",
        "held = steps_",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "SecondReleasedTwice": (
        "s_.rings.release_second(held); const bool there =",
        "s_.rings.release_second(held); s_.rings.release_second(held); const bool there =",
        r"TOO MANY ARRIVALS on (both|second)_empty|RACE|PHASE ALIAS",
    ),
    "SecondReleasedWhileItsLseIsRead": (
        "weigh(next); wait_first(next); wait_room(); wgmma_wait<0>(grad_k_);"
        " s_.rings.release_second(held);",
        "wgmma_wait<0>(grad_k_); s_.rings.release_second(next); weigh(next); wait_first(next);"
        " wait_room();",
        r"RACE: .*TMA load into (q|grad_out)|RACE: .*lse\[\d+\]|TOO MANY ARRIVALS|DEADLOCK"
        r"|PHASE ALIAS",
    ),
    "WorkTileNotEnded": (
        "steps_.end_work_tile();",
        "",
        r"DEADLOCK|(RACE|NEVER WRITTEN): .*steps\[\d\]",
    ),
    # products
    "ScoresNotAwaited": (
        "wgmma_wait<1>(scores_);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "ScoresWaitTooShallow": (
        "wgmma_wait<1>(scores_);",
        "wgmma_wait<2>(scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "FirstScoresNotAwaited": (
        "wgmma_wait<0>(scores_);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "FirstScoresWaitTooShallow": (
        "wgmma_wait<0>(scores_);",
        "wgmma_wait<1>(scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "ProductsInWrongOrder": (
        "issue_scores(next); issue_grad_k(held);",
        "issue_grad_k(held); issue_scores(next);",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradScoresNotAwaited": (
        "wgmma_wait<1>(grad_scores_);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "GradScoresWaitTooShallow": (
        "wgmma_wait<1>(grad_scores_);",
        "wgmma_wait<2>(grad_scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradVNotAwaited": (
        "wgmma_wait<0>(grad_v_);",
        "",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "GradVWaitTooShallow": (
        "wgmma_wait<0>(grad_v_);",
        "wgmma_wait<1>(grad_v_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradVNotAwaitedBeforeRounding": (
        "wgmma_wait<0>(grad_v_); release_first(step); round_to<Element>(rounded_, grad_scores_);",
        "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_v_); release_first(step);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "GradKWaitTooShallow": (
        "wgmma_wait<0>(grad_k_); s_.rings.release_second(held); held = steps_",
        "wgmma_wait<1>(grad_k_); s_.rings.release_second(held); held = steps_",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradKNotAwaited": (
        "wgmma_wait<0>(grad_k_); s_.rings.release_second(held); const bool there =",
        "s_.rings.release_second(held); const bool there =",
        "FRAGMENT IN FLIGHT|RACE",
    ),
    "GradVNotCommitted": (
        "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[step.first().stage]); wgmma_commit();",
        "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[step.first().stage]);",
        "WGMMA STILL IN FLIGHT",
    ),
    # the gradients leave
    "GradientsNotFenced": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*TMA store from [kv]\[\d\]",
    ),
    "FencedBeforeTheLastStore": (
        "write_tile(s_.v[w_], rounded); fence_async_proxy();",
        "fence_async_proxy(); write_tile(s_.v[w_], rounded);",
        r"MISSING PROXY FENCE .*TMA store from v\[\d\]",
    ),
    "WarpsDoNotMeet": (
        "named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "",
        r"MISSING NAMED BARRIER .*TMA store from [kv]\[\d\]",
    ),
    "WarpgroupsMeet": (
        "named_sync(consumer_barrier(w_), kWarpgroupThreads);",
        "named_sync(1, 2 * kWarpgroupThreads);",
        r"DEADLOCK: .*named barrier 1 \(128 of 256 threads are there\)",
    ),
    "StoredByAll": (
        "if (elect_one()) { const TilePlace to",
        "{ const TilePlace to",
        'NOT ELECTED: .*"TMA store from"',
    ),
    "StoresNotCommitted": (
        "bulk_commit();",
        "",
        "RACE|STORES NEVER COMMITTED",
    ),
    "StoresNotRead": (
        "bulk_commit(); bulk_wait_read<0>();",
        "bulk_commit();",
        r"RACE: .*TMA load into [kv]\[\d\].* not ordered after .*TMA store from",
    ),
    "StoresWaitTooShallow": (
        "bulk_wait_read<0>();",
        "bulk_wait_read<1>();",
        r"RACE: .*TMA load into [kv]\[\d\].* not ordered after .*TMA store from",
    ),
    # rows of a tile that no load brings
    "TailOfKNotZeroed": (
        "zero_tail(s.k[w], p.keys.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* k\[\d+\]",
    ),
    "TailOfVNotZeroed": (
        "zero_tail(s.v[w], p.keys.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* v\[\d+\]",
    ),
    "TailOfQNotZeroed": (
        "zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* q\[\d+\]",
    ),
    "TailOfGradOutNotZeroed": (
        "zero_tail(s.grad_out[i], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* grad_out\[\d+\]",
    ),
    "TailsNotFenced": (
        "fence_async_proxy(); }",
        "}",
        r"MISSING PROXY FENCE between \[prologue: store to",
    ),
    # nothing but the numbers tells
    "StatsOfTheFirstHead": (
        "p_.stats(chunk.work.batch, chunk.head,",
        "p_.stats(chunk.work.batch, chunk.work.head,",
        "WRONG NUMBERS in d[kv]",
    ),
}
