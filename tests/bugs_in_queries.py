# SPDX-License-Identifier: Apache-2.0
"""Bugs in the pass over query tiles and in the ring, for test_backward_bugs.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from planted_bugs import Bugs

IN_QUERIES: Bugs = {
    # Q and dO, and what the consumer is told with them
    "QFullNotAwaited": (
        "s_.q_full[w_].wait(round);",
        "",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "AssignmentReadBeforeQFull": (
        "s_.q_full[w_].wait(round); const Assignment item = s_.assignment[w_].get();",
        "const Assignment item = s_.assignment[w_].get(); s_.q_full[w_].wait(round);",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "QEmptyNotAwaited": (
        "s_.q_empty[w].wait(round - 1);",
        "",
        "RACE|TOO MANY ARRIVALS on q_full",
    ),
    "QEmptyAwaitedForThisRound": (
        "s_.q_empty[w].wait(round - 1);",
        "s_.q_empty[w].wait(round);",
        r"DEADLOCK: .*producer waits for q_empty\[0\] use 0",
    ),
    "QEmptyBeforeStore": (
        "if (item.tile >= 0) store(item); s_.q_empty[w_].arrive_all();",
        "s_.q_empty[w_].arrive_all(); if (item.tile >= 0) store(item);",
        r"(RACE: |MISSING NAMED BARRIER).*TMA load into (q|grad_out)\[\d\]",
    ),
    "QEmptyBeforeGather": (
        "gather(); if (item.tile >= 0) store(item); s_.q_empty[w_].arrive_all();",
        "s_.q_empty[w_].arrive_all(); gather(); if (item.tile >= 0) store(item);",
        r"(RACE: |MISSING NAMED BARRIER).*TMA load into (q|grad_out)\[\d\]",
    ),
    "QEmptyLost": (
        "s_.q_empty[w_].arrive_all();",
        "",
        r"DEADLOCK: .*producer waits for q_empty\[0\] use 0",
    ),
    "QEmptyByOneThreadForAll": (
        "s_.q_empty[w_].arrive_all();",
        "for (int i = 0; elect_one() && i < 128; ++i) s_.q_empty[w_].arrive_one();",
        r"MISSING NAMED BARRIER .*load from assignment",
    ),
    "BytesOfGradOutForgotten": (
        "full.arrive_expect_tx(2 * p_.queries.box_rows(at) * D * 2);",
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D * 2);",
        r"WRONG EXPECT_TX: q_full\[\d\] use \d expects fewer bytes|RACE: .*grad_out\[\d\]",
    ),
    "SlotExpectsWholeTiles": (
        "const int bytes = 2 * p_.keys.box_rows(at) * D * 2;",
        "const int bytes = 2 * kTileRows * D * 2;",
        r"WRONG EXPECT_TX: slot_full\[\d+\] use \d still expects 1024 bytes",
    ),
    "IdleConsumerNotTold": (
        "if (tile < 0) return full.arrive_one();",
        "if (tile < 0) return;",
        r"DEADLOCK: .*consumer\d waits for q_full",
    ),
    # the plan's chunks
    "FirstChunkNotToldApart": (
        "if (chunk.first()) {",
        "{",
        "DEADLOCK: .*producer waits for q_empty",
    ),
    "ChunkNotGivenBack": (
        "s_.plan.give_back(n);",
        "",
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0",
    ),
    "ChunkGivenBackTwice": (
        "s_.plan.give_back(n);",
        "s_.plan.give_back(n); s_.plan.give_back(n);",
        r"RACE|TOO MANY ARRIVALS|PHASE ALIAS|DEADLOCK",
    ),
    "ChunkGivenBackBeforeItsSteps": (
        "for (int i = 0; i < chunk.steps; ++i) load_keys(n, i); s_.plan.give_back(n);",
        "s_.plan.give_back(n); for (int i = 0; i < chunk.steps; ++i) load_keys(n, i);",
        r"RACE: .*planner: store to (steps|chunks|origins)\[\d\]",
    ),
    "StepReadOfTheNextChunk": (
        "s_.plan.step(n, i)",
        "s_.plan.step(n + 1, i)",
        r"(RACE|NEVER WRITTEN): .*steps",
    ),
    # the slots, and the barrier that what comes into them counts on
    "LastFlagLost": (
        "step.flags(), rows, bytes);",
        "step.flags() & ~KeySlots::kLast, rows, bytes);",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "NothingNotPosted": (
        "if (chunk.steps == 0) s_.slots.post_nothing(slot_++);",
        "",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    # slots given back
    "SlotReleasedBeforeWait": (
        "wgmma_wait<0>(grad_q_); slots_.release(held); round_to",
        "slots_.release(held); wgmma_wait<0>(grad_q_); round_to",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "SlotReleasedBeforeGradient": (
        "issue_gradient(held); wgmma_wait<0>(grad_q_); slots_.release(held); held =",
        "slots_.release(held); issue_gradient(held); wgmma_wait<0>(grad_q_); held =",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "SlotNotReleased": (
        "slots_.release(held); held = next.number",
        "held = next.number",
        "DEADLOCK: .*producer waits for slot_empty",
    ),
    "SlotReleasedTwice": (
        "slots_.release(held); held = next.number",
        "slots_.release(held); slots_.release(held); held = next.number",
        "(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
    ),
    # products
    "ScoresNotAwaited": (
        "wgmma_wait<1>(scores_, grad_scores_);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "FirstScoresWaitTooShallow": (
        "wgmma_wait<0>(scores_, grad_scores_);",
        "wgmma_wait<1>(scores_, grad_scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "ProductsInWrongOrder": (
        "issue_scores(next); issue_gradient(held);",
        "issue_gradient(held); issue_scores(next);",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradQWaitTooShallow": (
        "wgmma_wait<0>(grad_q_); slots_.release(held); held",
        "wgmma_wait<1>(grad_q_); slots_.release(held); held",
        "WGMMA STILL IN FLIGHT",
    ),
    "RoundedOverwritten": (
        "wgmma_wait<0>(grad_q_); slots_.release(held); round_to<Element>(rounded_, grad_scores_);",
        "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_q_); slots_.release(held);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    # the gradient leaves
    "GradientNotFenced": (
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
    # rows of a tile that no load brings
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
    "TailOfQNotZeroed": (
        "zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* q\[\d+\]",
    ),
    "TailOfGradOutNotZeroed": (
        "zero_tail(s.grad_out[w], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* grad_out\[\d+\]",
    ),
    "TailsNotFenced": (
        "fence_async_proxy(); }",
        "}",
        r"MISSING PROXY FENCE between \[prologue: store to",
    ),
}

IN_SLOTS: Bugs = {
    "SlotFullNotAwaited": (
        "s_.ring.wait(number);",
        "",
        r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
    ),
    "SlotEmptyNotAwaited": (
        "ring.wait_empty(n); rows[ring.stage(n)].set(tokens);",
        "rows[ring.stage(n)].set(tokens);",
        r"RACE: .*producer: (store to|TMA load into) |TOO MANY ARRIVALS on slot_full",
    ),
    "RowsOfNothingNotSet": (
        "rows[ring.stage(n)].set(0);",
        "",
        r"NEVER WRITTEN: .*load from rows\[\d+\]",
    ),
    "ReadBeforeFull": (
        "s_.ring.wait(number); const uint32_t flags = s_.flags[stage].get();",
        "const uint32_t flags = s_.flags[stage].get(); s_.ring.wait(number);",
        r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
    ),
    "RowsReadAfterRelease": (
        "s_.ring.release(number); } return",
        "s_.ring.release(number); s_.rows[stage].get(); } return",
        r"RACE: .*rows\[\d+\]",
    ),
    "OthersSlotsKept": (
        "s_.ring.release(number);",
        "",
        "DEADLOCK: .*producer waits for slot_empty",
    ),
    "LimitOneTooFar": (
        "held.number + Stages",
        "held.number + Stages + 1",
        "DEADLOCK: .*producer waits for slot_empty",
    ),
    "ItemNotBegun": (
        "{ ended_ = false; }",
        "{}",
        "LOADS STILL IN FLIGHT|DEADLOCK: .*slot_empty",
    ),
    "NothingSaidAfterArrival": (
        "flags[ring.stage(n)].set(kLast); ring.full[ring.stage(n)].arrive_one();",
        "ring.full[ring.stage(n)].arrive_one(); flags[ring.stage(n)].set(kLast);",
        r"(RACE|NEVER WRITTEN): .*load from flags\[\d+\]",
    ),
}

IN_RING: Bugs = {
    "OneConsumerFreesASlot": (
        "consumers * kWarpgroupThreads",
        "kWarpgroupThreads",
        r"(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
    ),
    "EmptyAwaitedForThisUse": (
        "empty[stage(n)].wait(use(n) - 1);",
        "empty[stage(n)].wait(use(n));",
        r"DEADLOCK: .*producer waits for slot_empty\[0\] use 0",
    ),
    "FullAwaitedForAnEarlierUse": (
        "full[stage(n)].wait(use(n));",
        "full[stage(n)].wait(use(n) - 1);",
        r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
    ),
}
