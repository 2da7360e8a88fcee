# SPDX-License-Identifier: Apache-2.0
"""Mutants of the consumers that make dQ at head_dim 128, for test_one_pass.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

OUT_OF_STEP = "DEADLOCK|TOO MANY ARRIVALS|PHASE ALIAS|RACE|NEVER WRITTEN|WRONG NUMBERS"

IN_QUERY_HALVES: MutantTable = {
    # dS^T to the other consumer
    "RoomNotAwaited": (
        "used.wait(met - 1);",
        ";",
        r"RACE: .*consumer\d: store to (grad_scores|k)\[\d\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "RoomOfTheNextMeeting": (
        "used.wait(met - 1);",
        "used.wait(met);",
        r"DEADLOCK: .*consumer\d waits for used",
    ),
    "NotFenced": (
        "fence_async_proxy(); if (elect_one())",
        "if (elect_one())",
        r"MISSING PROXY FENCE .*grad_scores\[\d\]",
    ),
    "FencedTooLate": (
        "fence_async_proxy(); if (elect_one()) bulk_wait_read<0>(); made.arrive_all();",
        "if (elect_one()) bulk_wait_read<0>(); made.arrive_all(); fence_async_proxy();",
        r"(MISSING PROXY FENCE|MISSING NAMED BARRIER|RACE).*grad_scores\[\d\]",
    ),
    "NotHandedOver": (
        "made.arrive_all();",
        "",
        r"DEADLOCK: .*consumer\d waits for made",
    ),
    "MadeByOne": (
        'made.init(Consumers * kWarpgroupThreads, "made", 0);',
        'made.init(kWarpgroupThreads, "made", 0);',
        r"(RACE|NEVER WRITTEN): .*grad_scores\[\d\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "UsedByOne": (
        'used.init(Consumers * kWarpgroupThreads, "used", 0);',
        'used.init(kWarpgroupThreads, "used", 0);',
        r"RACE: .*(grad_scores|k)\[\d\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "OthersNotAwaited": (
        "made.wait(met);",
        ";",
        r"(RACE|NEVER WRITTEN|MISSING NAMED BARRIER).*grad_scores\[\d\]",
    ),
    "OthersOfTheNextMeeting": (
        "made.wait(met);",
        "made.wait(met + 1);",
        r"DEADLOCK: .*consumer\d waits for made|PHASE ALIAS",
    ),
    "NotReleased": (
        "used.arrive_all();",
        "",
        r"DEADLOCK: .*consumer\d waits for used",
    ),
    # its sums
    "StagingNotAwaited": (
        "if (elect_one()) bulk_wait_read<0>();",
        "",
        r"RACE: .*consumer\d: store to staging\[\d\]",
    ),
    "StagingWaitTooShallow": (
        "bulk_wait_read<0>();",
        "bulk_wait_read<1>();",
        r"RACE: .*consumer\d: store to staging\[\d\]",
    ),
    "StagingAwaitedByOneThread": (
        "if (elect_one()) bulk_wait_read<0>(); made.arrive_all();",
        "made.arrive_all(); if (elect_one()) bulk_wait_read<0>();",
        r"(RACE|MISSING NAMED BARRIER).*staging\[\d\]",
    ),
    "StagingNotFenced": (
        "fence_async_proxy(); named_sync",
        "named_sync",
        r"MISSING PROXY FENCE .*staging\[\d\]",
    ),
    "WarpsDoNotMeet": (
        "named_sync(consumer_barrier(w), kWarpgroupThreads);",
        "",
        r"MISSING NAMED BARRIER .*staging\[\d\]",
    ),
    "AddedByAll": (
        "if (elect_one()) { bulk_reduce_add",
        "{ bulk_reduce_add",
        'NOT ELECTED: .*"bulk reduce from"',
    ),
    "ReductionNotCommitted": (
        "bulk_commit();",
        "",
        "RACE|STORES NEVER COMMITTED",
    ),
}

IN_ONE_PASS_CONSUMER: MutantTable = {
    # the halves
    "TheOtherHalf": (
        "s_.k[0], w_, false);",
        "s_.k[0], 1 - w_, false);",
        "WRONG NUMBERS in dq",
    ),
    "SumGoesOn": (
        "s_.k[0], w_, false);",
        "s_.k[0], w_, true);",
        "WRONG NUMBERS in dq",
    ),
    "SecondAlone": (
        "s_.k[1], w_, true);",
        "s_.k[1], w_, false);",
        "WRONG NUMBERS in dq",
    ),
    "FirstTwice": (
        "s_.sums.grad_scores[1], s_.k[1], w_, true);",
        "s_.sums.grad_scores[0], s_.k[1], w_, true);",
        "WRONG NUMBERS in dq",
    ),
    "KOfTheFirst": (
        "s_.k[1], w_, true);",
        "s_.k[0], w_, true);",
        "WRONG NUMBERS in dq",
    ),
    "InThePlaceOfTheOther": (
        "+ w_ * kSumsOfPanel,",
        "+ (1 - w_) * kSumsOfPanel,",
        "WRONG NUMBERS in dq",
    ),
    "SumsOfTheFirstTile": (
        "batch_, step.sum())",
        "batch_, 0 * step.sum())",
        "WRONG NUMBERS in dq",
    ),
    # who waits for whom
    "NotHandedOverAtFirst": (
        "differentiate(held); hand_over();",
        "differentiate(held);",
        OUT_OF_STEP,
    ),
    "NotHandedOverBeforeAWait": (
        "if (!there) hand_over();",
        "",
        OUT_OF_STEP,
    ),
    "HandedOverTooLate": (
        "hand_over(); s_.sums.wait_others(met_ - 1); issue_half(); wgmma_wait<2>",
        "s_.sums.wait_others(met_ - 1); hand_over(); issue_half(); wgmma_wait<2>",
        r"DEADLOCK: .*consumer\d waits for made",
    ),
    "HandedOverTwice": (
        "owes_ = false; s_.sums",
        "s_.sums",
        OUT_OF_STEP,
    ),
    "AllIsPut": (
        "if (step.meets()) put();",
        "put();",
        OUT_OF_STEP,
    ),
    "AloneTakenForTogether": (
        "if (held.meets()) advance_together(held, next);",
        "if (next.meets()) advance_together(held, next);",
        OUT_OF_STEP,
    ),
    "ReleasedBeforeTheWait": (
        "wgmma_wait<0>(grad_scores_); add(held);",
        "s_.sums.release(); wgmma_wait<0>(grad_scores_); add(held);",
        OUT_OF_STEP,
    ),
    "GradientsReplaceKTooEarly": (
        "s_.sums.wait_room(met_); Operand<D> rounded;",
        "Operand<D> rounded;",
        r"RACE: .* k\[\d\]",
    ),
    # products
    "ScoresWaitTooShallow": (
        "wgmma_wait<2>(scores_);",
        "wgmma_wait<3>(scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "SumNotAwaited": (
        "wgmma_wait<0>(grad_k_, grad_scores_);",
        "wgmma_wait<1>(grad_k_);",
        "WGMMA STILL IN FLIGHT|FRAGMENT IN FLIGHT",
    ),
    "LastSumNotAwaited": (
        "wgmma_wait<0>(grad_scores_); add(held);",
        "add(held);",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "OperandReadInFlight": (
        "multiply<Element>(grad_scores_, weights);",
        "multiply<Element>(grad_scores_, rounded_);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    "SecondReleasedBeforeWait": (
        "wgmma_wait<0>(grad_k_, grad_scores_); s_.rings.release_second(held);",
        "s_.rings.release_second(held); wgmma_wait<0>(grad_k_, grad_scores_);",
        r"RACE: .*TMA load into q\[\d+\]",
    ),
    # numbers
    "RowsThatAreNoneKept": (
        "if (rows_ != ~uint64_t{0}) keep_rows(rounded_, rows_);",
        "",
        "WRONG NUMBERS in dq",
    ),
    "WeightsNotTaken": (
        "multiply<Element>(grad_scores_, weights);",
        "",
        "WRONG NUMBERS in d[qk]",
    ),
}

# Of the scheduler, where steps say where dQ is added up.
IN_PLACES: MutantTable = {
    "AllMeet": (
        "written[lane].flags() == (1u << Rows) - 1);",
        "true);",
        r"DEADLOCK: .*consumer\d waits for (made|used)|" + OUT_OF_STEP,
    ),
    "PlacesOfTheFirstHead": (
        "ConsumerStep::sum_of(head * columns_.num_tiles() + tile,",
        "ConsumerStep::sum_of(tile,",
        "WRONG NUMBERS in dq",
    ),
}
