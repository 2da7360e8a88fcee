# SPDX-License-Identifier: Apache-2.0
"""Bugs in the backward's pass over key tiles, for test_backward_bugs.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from planted_bugs import Bugs

IN_KEYS: Bugs = {
    # K and V, and what the consumer is told with them
    "KvFullNotAwaited": (
        "s_.kv_full[w_].wait(round);",
        "",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "AssignmentReadBeforeKvFull": (
        "s_.kv_full[w_].wait(round); const Assignment item = s_.assignment[w_].get();",
        "const Assignment item = s_.assignment[w_].get(); s_.kv_full[w_].wait(round);",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "KvEmptyNotAwaited": (
        "s_.kv_empty[w].wait(round - 1);",
        "",
        "RACE|TOO MANY ARRIVALS on kv_full",
    ),
    "AssignmentSetBeforeKvEmpty": (
        "s_.kv_empty[w].wait(round - 1); s_.assignment[w].set(assignment);",
        "s_.assignment[w].set(assignment); s_.kv_empty[w].wait(round - 1);",
        r"RACE: .*store to assignment\[\d\]",
    ),
    "KvEmptyBeforeStore": (
        "if (item.tile >= 0) store(item); s_.kv_empty[w_].arrive_all();",
        "s_.kv_empty[w_].arrive_all(); if (item.tile >= 0) store(item);",
        r"(RACE: |MISSING NAMED BARRIER).*TMA load into [kv]\[\d\]",
    ),
    "KvEmptyLost": (
        "s_.kv_empty[w_].arrive_all();",
        "",
        r"DEADLOCK: .*producer waits for kv_empty\[0\] use 0",
    ),
    "KvEmptyTwice": (
        "s_.kv_empty[w_].arrive_all();",
        "s_.kv_empty[w_].arrive_all(); s_.kv_empty[w_].arrive_all();",
        r"(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) kv_empty",
    ),
    "KvEmptyByOneThread": (
        "s_.kv_empty[w_].arrive_all();",
        "if (elect_one()) s_.kv_empty[w_].arrive_one();",
        r"DEADLOCK: .*producer waits for kv_empty\[0\] use 0 .* 127 of 128 arrivals missing",
    ),
    "KvEmptyByOneThreadForAll": (
        "s_.kv_empty[w_].arrive_all();",
        "for (int i = 0; elect_one() && i < 128; ++i) s_.kv_empty[w_].arrive_one();",
        r"MISSING NAMED BARRIER .*load from assignment",
    ),
    "KvEmptyOfOneThread": (
        's.kv_empty[w].init(kWarpgroupThreads, "kv_empty", w);',
        's.kv_empty[w].init(1, "kv_empty", w);',
        "TOO MANY ARRIVALS on kv_empty",
    ),
    "KvEmptyNotInitialised": (
        's.kv_empty[w].init(kWarpgroupThreads, "kv_empty", w);',
        "",
        "MBARRIER NOT INITIALISED",
    ),
    "KvExpectsWholeTiles": (
        "2 * p_.keys.box_rows(at) * D * 2",
        "2 * kTileRows * D * 2",
        r"WRONG EXPECT_TX: kv_full\[\d\] use \d still expects 1024 bytes",
    ),
    "IdleConsumerNotTold": (
        "if (tile < 0) return full.arrive_one();",
        "if (tile < 0) return;",
        r"DEADLOCK: .*consumer1 waits for kv_full\[1\]",
    ),
    "StopNotTold": (
        "assign(w, {0, 0, Assignment::kStop}, round).arrive_one();",
        "assign(w, {0, 0, Assignment::kStop}, round);",
        r"DEADLOCK: \[consumer0 waits for kv_full\[0\]",
    ),
    # the plan's chunks
    "FirstChunkNotToldApart": (
        "if (chunk.first()) {",
        "{",
        "DEADLOCK: .*producer waits for kv_empty",
    ),
    "ChunkNotGivenBack": (
        "s_.plan.give_back(n);",
        "",
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0",
    ),
    "ChunkGivenBackBeforeItsSteps": (
        "for (int i = 0; i < chunk.steps; ++i) load_queries(n, i); s_.plan.give_back(n);",
        "s_.plan.give_back(n); for (int i = 0; i < chunk.steps; ++i) load_queries(n, i);",
        r"RACE: .*planner: store to (steps|chunks|origins)\[\d\]",
    ),
    # the slots, and the barrier that what comes into them counts on
    "LastFlagLost": (
        "step.flags(), ~uint64_t{0}, bytes);",
        "step.flags() & ~QuerySlots::kLast, ~uint64_t{0}, bytes);",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "NothingNotPosted": (
        "if (chunk.steps == 0) s_.slots.post_nothing(slot_++);",
        "",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "StatsBytesForgotten": (
        "D * 2 + static_cast<int>(sizeof(RowStats));",
        "D * 2;",
        r"WRONG EXPECT_TX: slot_full\[\d+\] use \d expects fewer bytes",
    ),
    "StatsOnWrongBarrier": (
        "sizeof(RowStats), full);",
        "sizeof(RowStats), s_.kv_full[0]);",
        r"WRONG EXPECT_TX: (kv_full\[0\]|slot_full\[\d+\] use \d still expects 512 bytes)",
    ),
    "StatsNotLoaded": (
        "bulk_load(&s_.stats[stage],",
        "if (false) bulk_load(&s_.stats[stage],",
        r"WRONG EXPECT_TX: slot_full\[\d+\] use \d still expects 512 bytes",
    ),
    "StatsInWrongStage": (
        "bulk_load(&s_.stats[stage],",
        "bulk_load(&s_.stats[0],",
        r"(RACE|NEVER WRITTEN): .*stats\[\d+\]",
    ),
    "LoadedIntoNextStage": (
        "const int stage = s_.slots.ring.stage(slot_);",
        "const int stage = s_.slots.ring.stage(slot_ + 1);",
        r"(NEVER WRITTEN|RACE): .*(q|grad_out|stats)\[\d+\]",
    ),
    # slots given back
    "SlotReleasedBeforeWait": (
        "wgmma_wait<0>(grad_k_); slots_.release(held); differentiate(next);",
        "slots_.release(held); wgmma_wait<0>(grad_k_); differentiate(next);",
        r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
    ),
    "LastSlotReleasedBeforeWait": (
        "wgmma_wait<0>(grad_k_); slots_.release(held); held = next.number",
        "slots_.release(held); wgmma_wait<0>(grad_k_); held = next.number",
        r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
    ),
    "SlotNotReleased": (
        "slots_.release(held); differentiate(next);",
        "differentiate(next);",
        "DEADLOCK: .*producer waits for slot_empty",
    ),
    "LastSlotNotReleased": (
        "slots_.release(held); held = next.number",
        "held = next.number",
        "DEADLOCK: .*producer waits for slot_empty",
    ),
    "SlotReleasedTwice": (
        "slots_.release(held); differentiate(next);",
        "slots_.release(held); slots_.release(held); differentiate(next);",
        "(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
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
        "wgmma_wait<0>(grad_v_); round_to<Element>(rounded_, grad_scores_);",
        "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_v_);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "GradKWaitTooShallow": (
        "wgmma_wait<0>(grad_k_); slots_.release(held); held = next.number",
        "wgmma_wait<1>(grad_k_); slots_.release(held); held = next.number",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradKNotAwaited": (
        "wgmma_wait<0>(grad_k_); slots_.release(held); differentiate(next);",
        "slots_.release(held); differentiate(next);",
        "FRAGMENT IN FLIGHT|RACE",
    ),
    "GradVNotCommitted": (
        "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[slot.stage]); wgmma_commit();",
        "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[slot.stage]);",
        "WGMMA STILL IN FLIGHT",
    ),
    # the gradients leave
    "GradientsNotFenced": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*TMA store from [kv]\[\d\]",
    ),
    "FencedBeforeTheLastStore": (
        "round_to<Element>(rounded, grad_v_); write_tile(s_.v[w_], rounded); fence_async_proxy();",
        "fence_async_proxy(); round_to<Element>(rounded, grad_v_); write_tile(s_.v[w_], rounded);",
        r"MISSING PROXY FENCE .*TMA store from v\[\d\]",
    ),
    "WarpsDoNotMeet": (
        "named_sync(1 + w_, kWarpgroupThreads);",
        "",
        r"MISSING NAMED BARRIER .*TMA store from [kv]\[\d\]",
    ),
    "WarpgroupsMeet": (
        "named_sync(1 + w_, kWarpgroupThreads);",
        "named_sync(1, 2 * kWarpgroupThreads);",
        r"DEADLOCK: .*named barrier 1 \(128 of 256 threads are there\)",
    ),
    "StoredByAll": (
        "if (elect_one()) { const TileBox grad_k",
        "{ const TileBox grad_k",
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
