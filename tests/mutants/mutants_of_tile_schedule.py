# SPDX-License-Identifier: Apache-2.0
"""Mutants of tile_schedule.h, for test_backward_kernels.py and test_tile_scheduler.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

A_PRODUCER_WAITS = r"DEADLOCK: .*producer\d waits for"
A_CONSUMER_WAITS = r"DEADLOCK: .*consumer\d waits for"
EARLIER_PHASE = (
    r"RACE: .*(q|k|v|grad_out)\[\d\]"
    r"|(PHASE ALIAS|DEADLOCK): .*consumer\d waits for (both|first|second)_full"
)

# Found in both passes of the backward.
IN_SCHEDULE: MutantTable = {
    # chunks handed over
    "ScheduleFullNotAwaited": (
        "full[n % kBuffers].wait(n / kBuffers); const Chunk of",
        "const Chunk of",
        r"(NEVER WRITTEN|RACE): .*load from chunks\[\d\]",
    ),
    "ScheduleFullAwaitedForAnEarlierUse": (
        "full[n % kBuffers].wait(n / kBuffers);",
        "full[n % kBuffers].wait(n / kBuffers - 1);",
        r"(NEVER WRITTEN|RACE): .*chunks\[\d\]"
        r"|(PHASE ALIAS|DEADLOCK): .*producer\d waits for schedule_full\[\d\]",
    ),
    "ReadBeforeScheduleFull": (
        "full[n % kBuffers].wait(n / kBuffers); const Chunk of = chunk(n);",
        "const Chunk of = chunk(n); full[n % kBuffers].wait(n / kBuffers);",
        r"(NEVER WRITTEN|RACE): .*load from chunks\[\d\]",
    ),
    "ScheduleFullOfOneLane": (
        'full[i].init(kWarpThreads, "schedule_full", i);',
        'full[i].init(1, "schedule_full", i);',
        "TOO MANY ARRIVALS on schedule_full",
    ),
    "ScheduleFullOfAWarpgroup": (
        'full[i].init(kWarpThreads, "schedule_full", i);',
        'full[i].init(kWarpgroupThreads, "schedule_full", i);',
        A_PRODUCER_WAITS + r" schedule_full\[0\] use 0 .* 96 of 128 arrivals missing",
    ),
    # ... and given back
    "ScheduleEmptyNotArrived": (
        "empty[n % kBuffers].arrive_one();",
        ";",
        r"DEADLOCK: .*scheduler waits for schedule_empty\[0\] use 0 .* 3 of \d+ arrivals missing",
    ),
    "ScheduleEmptyTwice": (
        "empty[n % kBuffers].arrive_one();",
        "empty[n % kBuffers].arrive_one(2);",
        r"PHASE ALIAS: .*scheduler waits for schedule_empty|RACE: .*scheduler: store to"
        r"|TOO MANY ARRIVALS on schedule_empty",
    ),
    "ScheduleEmptyOfOtherChunk": (
        "empty[n % kBuffers].arrive_one();",
        "empty[(n + 1) % kBuffers].arrive_one();",
        r"RACE|TOO MANY ARRIVALS on schedule_empty|DEADLOCK: .*scheduler waits for schedule_empty",
    ),
    "ScheduleEmptyOfOneProducer": (
        "empty[i].init(producers + warpgroups",
        "empty[i].init(1 + warpgroups",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    "ScheduleEmptyOfOneProducerTooMany": (
        "empty[i].init(producers + warpgroups",
        "empty[i].init(producers + 1 + warpgroups",
        r"DEADLOCK: .*scheduler waits for schedule_empty\[0\] use 0 .* 1 of \d+ arrivals missing",
    ),
    "ScheduleEmptyOfProducersAlone": (
        "empty[i].init(producers + warpgroups * kWarpgroupThreads",
        "empty[i].init(producers",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    "ScheduleEmptyOfOneConsumer": (
        "empty[i].init(producers + warpgroups * kWarpgroupThreads",
        "empty[i].init(producers + kWarpgroupThreads",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to",
    ),
    "ScheduleEmptyNotInitialised": (
        'empty[i].init(producers + warpgroups * kWarpgroupThreads, "schedule_empty", i);',
        "",
        r"MBARRIER NOT INITIALISED: used by (scheduler|producer\d|consumer\d)",
    ),
    # what lies in which buffer
    "LoadsReadInTheOtherBuffer": (
        "return loads[n % kBuffers][i].get();",
        "return loads[(n + 1) % kBuffers][i].get();",
        r"(NEVER WRITTEN|RACE): .*loads\[\d\]",
    ),
    "ChunkReadInTheOtherBuffer": (
        "return chunks[n % kBuffers].get();",
        "return chunks[(n + 1) % kBuffers].get();",
        r"(NEVER WRITTEN|RACE): .*chunks\[\d\]",
    ),
    "OriginsOfTheOtherBuffer": (
        "origins[n % kBuffers].get()",
        "origins[(n + 1) % kBuffers].get()",
        r"(NEVER WRITTEN|RACE): .*origins\[\d\]",
    ),
    "NoRoomForAFlushAndTheEnd": (
        "kConsumerSteps = Loads + 2;",
        "kConsumerSteps = Loads;",
        r"RACE: .*(steps|chunks)\[\d\]|DEADLOCK|WRONG NUMBERS",
    ),
    # what a chunk says
    "EveryChunkTakenForTheFirst": (
        "if (chunk.first()) load(chunk.work);",
        "load(chunk.work);",
        r"DEADLOCK: .*producer0 waits for resident_empty\[\d\]",
    ),
    "FinishNotLookedAt": (
        "if (of.finished()) break;",
        "",
        r"DEADLOCK: .*producer\d waits for schedule_full\[\d\]",
    ),
    "LastLoadForgotten": (
        "i < chunk.loads; ++i) load(n, i);",
        "i < chunk.loads - 1; ++i) load(n, i);",
        A_CONSUMER_WAITS + r" (both|first|second)_full|RACE",
    ),
    # what a load and a step say
    "PlaceInTilesNotTokens": (
        "w * sequence.step_tokens()}",
        "w}",
        "WRONG NUMBERS",
    ),
    "SecondStageOfTheFirst": (
        "second.stage << 16",
        "first.stage << 16",
        "RACE|DEADLOCK|TOO MANY ARRIVALS|NEVER WRITTEN",
    ),
    "SecondBarrierOfTheFirst": (
        "second.barrier << 24",
        "first.barrier << 24",
        "RACE|DEADLOCK|PHASE ALIAS|NEVER WRITTEN",
    ),
    "FirstPhaseForgotten": (
        "(first.phase & 0xfff) << 8",
        "0",
        EARLIER_PHASE,
    ),
    "SecondPhaseForgotten": (
        "static_cast<uint32_t>(second.phase) << 20",
        "0",
        EARLIER_PHASE,
    ),
    "PhaseOfTheSecondRead": (
        "static_cast<int>(phases >> 8 & 0xfff)}",
        "static_cast<int>(phases >> 20)}",
        EARLIER_PHASE,
    ),
    "PhaseOfEachUse": (
        "use / kRounds}",
        "use}",
        EARLIER_PHASE,
    ),
    "BarriersOfStagesOverlap": (
        "stage * kRounds + use % kRounds",
        "stage + use % kRounds",
        "RACE|PHASE ALIAS|TOO MANY ARRIVALS|WRONG EXPECT_TX|NEVER WRITTEN|DEADLOCK",
    ),
    "OneBarrierForAllRounds": (
        "stage * kRounds + use % kRounds",
        "stage * kRounds",
        "RACE|PHASE ALIAS|TOO MANY ARRIVALS|WRONG EXPECT_TX|NEVER WRITTEN|DEADLOCK",
    ),
}

# Found in tests/cpp/tile_scheduler.cpp.
IN_LOADS: MutantTable = {
    "ClipForgotten": (
        "uint64_t{at.clip} << kClip |",
        "",
        "WRONG (PLACE|ROWS)",
    ),
    "LayerForgotten": (
        "static_cast<uint64_t>(in_tiles.t) << 32 |",
        "",
        "WRONG (TILE|STEPS)",
    ),
    "SuffixPlacedInThePrefix": (
        "return {region, region == Region::Prefix ? w : sequence.prefix_tiles() + w,",
        "return {region, w,",
        "WRONG (PLACE|ROWS)",
    ),
    "SuffixNumberedAsThePrefix": (
        "+ (region == Region::Prefix ? w : sequence.prefix_tiles() + w);",
        "+ w;",
        "WRONG (TILE|STEPS)",
    ),
    "OneBarrierForEachStage": (
        "stage * kRounds + use % kRounds",
        "stage",
        "WRONG USE OF A RING",
    ),
    "PhaseOfTheUse": (
        "use / kRounds}",
        "use}",
        "WRONG USE OF A RING",
    ),
    "PhasesOfTheFirstAlone": (
        "static_cast<uint32_t>(second.phase) << 20",
        "static_cast<uint32_t>(first.phase) << 20",
        "WRONG USE OF A RING",
    ),
}
