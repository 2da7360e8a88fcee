# SPDX-License-Identifier: Apache-2.0
"""Mutants of how consumers get their resident tiles, and how each must be reported.

They go into csrc/kernels/schedule/resident_tiles.h and are found in both passes of the backward.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

IN_RESIDENT_TILES: MutantTable = {
    # a consumer
    "FullNotAwaited": (
        "full[w].wait(round);",
        "",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "AssignmentReadBeforeFull": (
        "full[w].wait(round); const Assignment work = assignment[w].get();",
        "const Assignment work = assignment[w].get(); full[w].wait(round);",
        r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
    ),
    "EmptyBeforeWork": (
        "read(work); empty[w].arrive_all();",
        "empty[w].arrive_all(); read(work);",
        r"(RACE: |MISSING NAMED BARRIER).*TMA load into (q|grad_out|k|v)\[\d\]",
    ),
    "EmptyLost": (
        "empty[w].arrive_all();",
        "",
        r"DEADLOCK: .*producer0 waits for resident_empty\[0\] use 0",
    ),
    "EmptyTwice": (
        "empty[w].arrive_all();",
        "empty[w].arrive_all(); empty[w].arrive_all();",
        r"(DEADLOCK: .*producer0 waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) resident_empty",
    ),
    "EmptyByOneThread": (
        "empty[w].arrive_all();",
        "if (elect_one()) empty[w].arrive_one();",
        r"DEADLOCK: .*producer0 waits for resident_empty\[0\] use 0 .* 127 of 128 arrivals missing",
    ),
    "EmptyByOneThreadForAll": (
        "empty[w].arrive_all();",
        "for (int i = 0; elect_one() && i < 128; ++i) empty[w].arrive_one();",
        r"MISSING NAMED BARRIER .*load from assignment",
    ),
    # their producer
    "EmptyNotAwaited": (
        "empty[w].wait(round - 1);",
        "",
        "RACE|TOO MANY ARRIVALS on resident_full",
    ),
    "EmptyAwaitedForThisRound": (
        "empty[w].wait(round - 1);",
        "empty[w].wait(round);",
        r"DEADLOCK: .*producer0 waits for resident_empty\[0\] use 0",
    ),
    "AssignmentSetBeforeEmpty": (
        "empty[w].wait(round - 1); assignment[w].set(next);",
        "assignment[w].set(next); empty[w].wait(round - 1);",
        r"RACE: .*store to assignment\[\d\]",
    ),
    "LoadedForOneConsumer": (
        "for (int w = 0; w < Consumers; ++w) { const int tile",
        "for (int w = 0; w < 1; ++w) { const int tile",
        r"DEADLOCK: .*consumer\d waits for resident_full",
    ),
    "IdleConsumerNotTold": (
        "if (tile < 0) barrier.arrive_one(); else",
        "if (tile >= 0)",
        r"DEADLOCK: .*consumer\d waits for resident_full\[\d\]",
    ),
    "FinishNotTold": (
        "assign(w, {0, 0, Assignment::kFinished}, round).arrive_one();",
        "assign(w, {0, 0, Assignment::kFinished}, round);",
        r"DEADLOCK: \[consumer0 waits for resident_full\[0\]",
    ),
    # barriers
    "EmptyOfOneThread": (
        'empty[w].init(kWarpgroupThreads, "resident_empty", w);',
        'empty[w].init(1, "resident_empty", w);',
        "TOO MANY ARRIVALS on resident_empty",
    ),
    "EmptyNotInitialised": (
        'empty[w].init(kWarpgroupThreads, "resident_empty", w);',
        "",
        "MBARRIER NOT INITIALISED",
    ),
}
