# SPDX-License-Identifier: Apache-2.0
"""Mutants of the rings of rings.h, for test_backward_kernels.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

EMPTY = r"(both|first|second)_empty\[\d+\]"
FULL = r"(both|first|second)_full\[\d+\]"
PRODUCER_STUCK = rf"DEADLOCK: .*producer\d waits for {EMPTY}"
CONSUMER_STUCK = rf"DEADLOCK: .*consumer\d waits for {FULL}"
# A stage is filled while someone reads it.
OVERWRITTEN = r"RACE: .*TMA load into"
# A stage is read before it is filled, or in an earlier phase.
TOO_EARLY = rf"(RACE|NEVER WRITTEN): |PHASE ALIAS: consumer\d waits for {FULL}"
# A stage is given back by too many.
TOO_FREE = rf"TOO MANY ARRIVALS on {EMPTY}|PHASE ALIAS: .*{EMPTY}|{OVERWRITTEN}"

IN_RINGS: MutantTable = {
    # a producer
    "EmptyNotAwaited": (
        "empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 1);",
        "",
        rf"{OVERWRITTEN}|TOO MANY ARRIVALS on|PHASE ALIAS|WRONG EXPECT_TX",
    ),
    "EmptyAwaitedForThisUse": (
        "empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 1);",
        "empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n));",
        rf"{PRODUCER_STUCK} use 0",
    ),
    "EmptyAwaitedForAnEarlierUse": (
        "empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 1);",
        "if (n >= Stages) empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 2);",
        rf"{OVERWRITTEN}|TOO MANY ARRIVALS on|PHASE ALIAS",
    ),
    "BarrierOfTheStage": (
        "full[RingUse::of<Stages>(n).barrier];",
        "full[Ring<Stages>::stage(n) * kRounds];",
        CONSUMER_STUCK,
    ),
    "BarrierOfTheNextRound": (
        "full[RingUse::of<Stages>(n).barrier];",
        "full[RingUse::of<Stages>(n + Stages).barrier];",
        rf"{CONSUMER_STUCK}|{TOO_EARLY}",
    ),
    "BytesNotExpected": (
        "barrier.arrive_expect_tx(bytes);",
        "barrier.arrive_one();",
        rf"WRONG EXPECT_TX: {FULL} use \d expects fewer bytes|RACE",
    ),
    "BytesExpectedOfNobody": (
        "barrier.arrive_expect_tx(bytes);",
        "barrier.arrive_expect_tx(bytes + 16);",
        rf"WRONG EXPECT_TX: {FULL} use \d still expects (16|32) bytes",
    ),
    "NobodySkips": (
        "if (skipping > 0) empty[",
        "if (false) empty[",
        PRODUCER_STUCK,
    ),
    "OneThreadSkips": (
        "arrive_one(skipping * kWarpgroupThreads);",
        "arrive_one(skipping);",
        PRODUCER_STUCK,
    ),
    "OneConsumerSkips": (
        "arrive_one(skipping * kWarpgroupThreads);",
        "arrive_one(Consumers * kWarpgroupThreads);",
        rf"{TOO_FREE}|{PRODUCER_STUCK}",
    ),
    "AllSkip": (
        "Consumers - popcount(waiting);",
        "Consumers;",
        TOO_FREE,
    ),
    "ThoseWhoStepSkip": (
        "Consumers - popcount(waiting);",
        "popcount(waiting);",
        rf"{PRODUCER_STUCK}|{TOO_FREE}",
    ),
    "FullOfTooFewProducers": (
        "full[i].init(Producers, full_name, i);",
        "full[i].init(1, full_name, i);",
        rf"TOO MANY ARRIVALS on both_full|{TOO_EARLY}|{OVERWRITTEN}",
    ),
    "FullOfTooManyProducers": (
        "full[i].init(Producers, full_name, i);",
        "full[i].init(Producers + 1, full_name, i);",
        rf"{CONSUMER_STUCK} use 0 .* 1 of \d arrivals missing",
    ),
    "FullsOfOneRound": (
        "i < Stages * kRounds; ++i",
        "i < Stages; ++i",
        r"MBARRIER NOT INITIALISED: used by (producer|consumer)\d",
    ),
    "EmptyOfOneConsumer": (
        "empty[i].init(Consumers * kWarpgroupThreads",
        "empty[i].init(kWarpgroupThreads",
        TOO_FREE,
    ),
    "EmptyOfOneThreadEach": (
        "empty[i].init(Consumers * kWarpgroupThreads",
        "empty[i].init(Consumers",
        TOO_FREE,
    ),
    # consumers
    "FullNotAwaited": (
        "full[at.barrier].wait(at.phase);",
        "",
        TOO_EARLY,
    ),
    "FullAwaitedForAnEarlierPhase": (
        "full[at.barrier].wait(at.phase);",
        "full[at.barrier].wait(at.phase - 1);",
        TOO_EARLY,
    ),
    "FullAwaitedForTheNextPhase": (
        "full[at.barrier].wait(at.phase);",
        "full[at.barrier].wait(at.phase + 1);",
        rf"{CONSUMER_STUCK}|PHASE ALIAS",
    ),
    "FullOfTheStageAwaited": (
        "full[at.barrier].wait(at.phase);",
        "full[at.stage].wait(at.phase);",
        rf"{CONSUMER_STUCK}|{TOO_EARLY}",
    ),
    "EmptyNotArrived": (
        "empty[at.stage].arrive_all();",
        "",
        PRODUCER_STUCK,
    ),
    "EmptyByOneThread": (
        "empty[at.stage].arrive_all();",
        "if (elect_one()) empty[at.stage].arrive_one();",
        PRODUCER_STUCK,
    ),
    "EmptyByOneThreadForAll": (
        "empty[at.stage].arrive_all();",
        "if (elect_one()) empty[at.stage].arrive_one(kWarpgroupThreads);",
        r"MISSING NAMED BARRIER|RACE",
    ),
    "EmptyOfAnotherStage": (
        "empty[at.stage].arrive_all();",
        "empty[(at.stage + 1) % Stages].arrive_all();",
        rf"{TOO_FREE}|{PRODUCER_STUCK}",
    ),
    # two rings
    "FirstNotSkipped": (
        "first.skip(n, waiting);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "SecondNotSkipped": (
        "second.skip(n, waiting);",
        "",
        r"DEADLOCK: .*producer\d waits for second_empty",
    ),
    "SecondSkippedTwice": (
        "second.skip(n, waiting);",
        "second.skip(n, waiting); second.skip(n, waiting);",
        r"TOO MANY ARRIVALS on second_empty|RACE|PHASE ALIAS",
    ),
    "FirstNotAwaited": (
        "first.wait(step.first());",
        "",
        TOO_EARLY,
    ),
    "SecondNotAwaited": (
        "second.wait(step.second());",
        "",
        TOO_EARLY,
    ),
    "SecondAwaitedInTheFirst": (
        "second.wait(step.second());",
        "first.wait(step.first());",
        TOO_EARLY,
    ),
    "SecondAwaitedWhereTheFirstLies": (
        "second.wait(step.second());",
        "second.wait(step.first());",
        rf"{CONSUMER_STUCK}|{TOO_EARLY}",
    ),
    "FirstNotReleased": (
        "first.release(step.first());",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "SecondNotReleased": (
        "second.release(step.second());",
        "",
        r"DEADLOCK: .*producer\d waits for second_empty",
    ),
    "SecondReleasedTwice": (
        "second.release(step.second());",
        "second.release(step.second()); second.release(step.second());",
        r"TOO MANY ARRIVALS on second_empty|RACE|PHASE ALIAS",
    ),
    "SecondReleasedWhereTheFirstLies": (
        "second.release(step.second());",
        "second.release(step.first());",
        r"TOO MANY ARRIVALS on second_empty|RACE|DEADLOCK: .*second_empty|PHASE ALIAS",
    ),
    # one ring
    "BothOfOneArrival": (
        'both.init("both_full", "both_empty");',
        'both.init("both_full", "both_empty"); for (int i = 0; i < Stages * both.kRounds; ++i)'
        ' both.full[i].init(1, "both_full", i);',
        rf"TOO MANY ARRIVALS on both_full|{TOO_EARLY}|{OVERWRITTEN}",
    ),
    "BothNotSkipped": (
        "both.skip(n, waiting);",
        "",
        r"DEADLOCK: .*producer\d waits for both_empty",
    ),
    "BothSkippedByEachProducer": (
        "return both.acquire(n, bytes); }",
        "Mbarrier& barrier = both.acquire(n, bytes); both.skip(n, waiting); return barrier; }",
        r"TOO MANY ARRIVALS on both_empty|RACE|PHASE ALIAS",
    ),
    "BothNotAwaited": (
        "both.wait(step.first());",
        "",
        TOO_EARLY,
    ),
    "BothNotReleased": (
        "both.release(step.second());",
        "",
        r"DEADLOCK: .*producer\d waits for both_empty",
    ),
    "BothReleasedTwice": (
        "both.release(step.second());",
        "both.release(step.second()); both.release(step.second());",
        r"TOO MANY ARRIVALS on both_empty|RACE|PHASE ALIAS",
    ),
}
