# SPDX-License-Identifier: Apache-2.0
"""Mutants of query_sums.h, and what a reducer asks of other headers, for test_backward_kernels.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

IN_QUERY_SUMS: MutantTable = {
    # dS^T on its way to the reducer
    "RoomNotAwaited": (
        "used[w][Places::stage(n)].wait(Places::use(n) - 1);",
        ";",
        r"RACE: .*consumer\d: store to grad_scores\[\d\]|TOO MANY ARRIVALS on made|PHASE ALIAS",
    ),
    "RoomOfTheNextUse": (
        "used[w][Places::stage(n)].wait(Places::use(n) - 1);",
        "used[w][Places::stage(n)].wait(Places::use(n));",
        r"DEADLOCK: .*consumer\d waits for used",
    ),
    "NotFenced": (
        "fence_async_proxy(); made[w]",
        "made[w]",
        r"MISSING PROXY FENCE .*grad_scores\[\d\]",
    ),
    "FencedTooEarly": (
        "fence_async_proxy(); made[w][Places::stage(n)].arrive_all();",
        "made[w][Places::stage(n)].arrive_all(); fence_async_proxy();",
        r"(MISSING PROXY FENCE|RACE).*grad_scores\[\d\]",
    ),
    "NotHandedOver": (
        "made[w][Places::stage(n)].arrive_all();",
        "",
        "DEADLOCK: .*reducer waits for made",
    ),
    "InTheNextPlace": (
        "write_panel(grad_scores[w][Places::stage(n)], rounded);",
        "write_panel(grad_scores[w][Places::stage(n + 1)], rounded);",
        r"(RACE|NEVER WRITTEN): .*grad_scores\[\d\]",
    ),
    "LastNotAwaited": (
        "used[w][Places::stage(n - 1)].wait(Places::use(n - 1));",
        ";",
        r"RACE: .* k\[\d\]",
    ),
    "LastButOneAwaited": (
        "if (n > 0) used[w][Places::stage(n - 1)].wait(Places::use(n - 1));",
        "if (n > 1) used[w][Places::stage(n - 2)].wait(Places::use(n - 2));",
        r"RACE: .* k\[\d\]",
    ),
    # its products
    "MadeNotAwaited": (
        "s_.sums.made[w][stage(w)].wait(Places::use(taken(w)));",
        ";",
        r"(RACE|NEVER WRITTEN): .*grad_scores\[\d\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "OneOfBothAwaited": (
        "wait(0); wait(1);",
        "wait(0);",
        r"(RACE|NEVER WRITTEN): .*grad_scores\[\d\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "FirstTwice": (
        "issue(1, true);",
        "issue(0, true);",
        "WRONG NUMBERS in dq|RACE|TOO MANY ARRIVALS",
    ),
    "SecondAlone": (
        "issue(1, true);",
        "issue(1, false);",
        "WRONG NUMBERS in dq",
    ),
    "SumGoesOn": (
        "issue(0, false);",
        "issue(0, true);",
        "WRONG NUMBERS in dq",
    ),
    "OtherOwner": (
        "owners == 1 ? 0 : 1;",
        "owners == 1 ? 1 : 0;",
        "DEADLOCK|WRONG NUMBERS|RACE",
    ),
    "KOfTheFirst": (
        "s_.k[w], 0, accumulate);",
        "s_.k[0], 0, accumulate);",
        r"WRONG NUMBERS in dq|RACE: .* k\[0\]|NEVER WRITTEN: .* k\[0\]",
    ),
    "BothNotAwaited": (
        "issue(1, true); wgmma_commit(); wgmma_wait<0>(sum_);",
        "issue(1, true); wgmma_commit();",
        "FRAGMENT IN FLIGHT: .*an accumulator|RACE: .*grad_scores",
    ),
    "ReleasedBeforeTheWait": (
        "issue(1, true); wgmma_commit(); wgmma_wait<0>(sum_); release(0);",
        "issue(1, true); wgmma_commit(); release(0); wgmma_wait<0>(sum_);",
        r"RACE: .*(grad_scores|k)\[\d\]|(WRONG NUMBERS|WGMMA)",
    ),
    "NotReleased": (
        "s_.sums.used[w][stage(w)].arrive_all();",
        ";",
        r"DEADLOCK: .*consumer\d waits for used",
    ),
    "OneOfBothNotReleased": (
        "release(0); release(1);",
        "release(0);",
        r"DEADLOCK|RACE|WRONG NUMBERS|PHASE ALIAS",
    ),
    # its sums
    "StagingNotAwaited": (
        "if (elect_one()) bulk_wait_read<Sums::kBuffers - 1>();",
        "",
        r"RACE: .*reducer: store to staging\[\d\]",
    ),
    "StagingWaitTooShallow": (
        "bulk_wait_read<Sums::kBuffers - 1>();",
        "bulk_wait_read<Sums::kBuffers>();",
        r"RACE: .*reducer: store to staging\[\d\]",
    ),
    "WarpsDoNotMeetBefore": (
        "meet(); write_raw(staging, sum_);",
        "write_raw(staging, sum_);",
        r"(MISSING NAMED BARRIER|RACE).*staging\[\d\]",
    ),
    "WarpsDoNotMeetAfter": (
        "fence_async_proxy(); meet();",
        "fence_async_proxy();",
        r"MISSING NAMED BARRIER .*staging\[\d\]",
    ),
    "StagingNotFenced": (
        "fence_async_proxy(); meet();",
        "meet();",
        r"MISSING PROXY FENCE .*staging\[\d\]",
    ),
    "ReductionNotCommitted": (
        "bulk_commit();",
        ";",
        "RACE|STORES NEVER COMMITTED|STORES",
    ),
    "ReductionsNotAwaited": (
        "if (elect_one()) bulk_wait<0>();",
        "",
        "STORES",
    ),
    "SumsOfTheFirstTile": (
        "load.tile(p_.queries)));",
        "0 * load.tile(p_.queries)));",
        "WRONG NUMBERS in dq",
    ),
    "SumsOfTheFirstHead": (
        "p_.sums(chunk.work.batch, chunk.head,",
        "p_.sums(chunk.work.batch, chunk.work.head,",
        "WRONG NUMBERS in dq",
    ),
}

# Of the pass over keys, where it has a reducer.
IN_KEYS_WITH_A_REDUCER: MutantTable = {
    "HandedOverBeforeItIsMade": (
        "s_.sums.hand_over(w_, made_++);",
        "s_.sums.hand_over(w_, ++made_);",
        r"(RACE|NEVER WRITTEN): .*grad_scores|DEADLOCK|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "NotHandedOverBeforeAWait": (
        "if (!there) hand_over();",
        "",
        "DEADLOCK|WRONG NUMBERS",
    ),
    "HandedOverAfterTheTileThatFollows": (
        "hand_over(); const ConsumerStep after = steps_.take();",
        "const ConsumerStep after = steps_.take();",
        "DEADLOCK|WRONG NUMBERS|RACE",
    ),
    "RowsThatAreNoneKept": (
        "if (rows_ != ~uint64_t{0}) keep_rows(rounded_, rows_);",
        "",
        "WRONG NUMBERS in dq",
    ),
    "RowsOfEveryTile": (
        "rows_ = work.tile < 0 ? 0 : p_.keys.rows(p_.keys.place(work.tile), work.batch);",
        "rows_ = 0xff;",
        "WRONG NUMBERS in d[qk]",
    ),
    "ScheduleNotReadByTheReducer": (
        "s.schedule.init(kProducers, kComputing);",
        "s.schedule.init(kProducers, kConsumers);",
        "TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    "GradientsReplaceKTooEarly": (
        "if constexpr (Sums::kThere) s_.sums.wait_used(w_, made_);",
        "",
        r"RACE: .* k\[\d\]",
    ),
}

# Of the scheduler, where it has one.
IN_OWNERS: MutantTable = {
    "OwnersAreAllThatWait": (
        "waiting[lane], written[lane].flags()));",
        "waiting[lane], waiting[lane]));",
        "DEADLOCK: .*reducer waits for made|WRONG NUMBERS in dq",
    ),
    "SharedTwice": (
        "open &= ~shared;",
        "",
        "DEADLOCK|WRONG NUMBERS|RACE|NEVER WRITTEN|PHASE ALIAS",
    ),
}
