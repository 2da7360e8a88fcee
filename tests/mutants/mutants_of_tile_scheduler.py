# SPDX-License-Identifier: Apache-2.0
"""Mutants of tile_scheduler.h that stop the backward's passes, for test_backward_kernels.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable
from mutants.mutants_of_tile_schedule import A_CONSUMER_WAITS, A_PRODUCER_WAITS

# Found in both passes.
IN_SCHEDULER: MutantTable = {
    # chunks handed over
    "ScheduleFullNotArrived": (
        "schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp();",
        "next_++;",
        A_PRODUCER_WAITS + r" schedule_full\[0\] use 0 .* 32 of 32 arrivals missing",
    ),
    "ScheduleFullByOneLane": (
        "schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp();",
        "if (elect_one()) schedule_.full[next_++ % TileSchedule::kBuffers].arrive_one();",
        A_PRODUCER_WAITS + r" schedule_full\[0\] use 0 .* 31 of 32 arrivals missing",
    ),
    "ScheduleFullByOneLaneForAll": (
        "schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp();",
        "for (int i = 0; elect_one() && i < 32; ++i)"
        " schedule_.full[next_ % TileSchedule::kBuffers].arrive_one(); ++next_;",
        r"MISSING NAMED BARRIER .*scheduler: store to .*(producer|consumer)\d: load from",
    ),
    "ScheduleFullTwice": (
        "schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp();",
        "schedule_.full[next_ % TileSchedule::kBuffers].arrive_warp();"
        " schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp();",
        r"(PHASE ALIAS|DEADLOCK): .*(producer|consumer)\d waits for schedule_full\[\d\]",
    ),
    "LoadsToldBeforeWritten": (
        "write_loads(word, done); write_steps(work.batch, here, ends ? ConsumerStep::kDone :"
        " ConsumerStep::kNextChunk);"
        " close();",
        "close(); write_loads(word, done);"
        " write_steps(work.batch, here, ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk);",
        r"(NEVER WRITTEN|RACE): .*(loads|steps)\[\d\]",
    ),
    "StepsToldBeforeWritten": (
        "write_steps(work.batch, here, ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk);"
        " close();",
        "close(); write_steps(work.batch, here, ends ? ConsumerStep::kDone :"
        " ConsumerStep::kNextChunk);",
        r"(NEVER WRITTEN|RACE): .*(loads|steps)\[\d\]",
    ),
    # ... and given back
    "ScheduleEmptyNotAwaited": (
        "schedule_.empty[buffer].wait(next_ / TileSchedule::kBuffers - 1);",
        "",
        r"RACE: .*scheduler: store to (chunks|origins|loads|steps)\[\d\]",
    ),
    "ScheduleEmptyAwaitedForThisUse": (
        "schedule_.empty[buffer].wait(next_ / TileSchedule::kBuffers - 1);",
        "schedule_.empty[buffer].wait(next_ / TileSchedule::kBuffers);",
        r"DEADLOCK: .*scheduler waits for schedule_empty\[0\] use 0",
    ),
    # what lies in which buffer
    "OriginsNotSaid": (
        "schedule_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),"
        " origin_of(second_, chunk.head, chunk.work.batch)});",
        "",
        r"NEVER WRITTEN: .*load from origins\[\d\]",
    ),
    "LoadsWrittenInTheOtherBuffer": (
        "schedule_.loads[buffer][place].set(",
        "schedule_.loads[1 - buffer][place].set(",
        r"(NEVER WRITTEN|RACE): .*loads\[\d\]",
    ),
    "StepsWrittenInTheOtherBuffer": (
        "schedule_.steps[buffer][r] + counts[r]",
        "schedule_.steps[1 - buffer][r] + counts[r]",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]",
    ),
    "StepsOfOneConsumer": (
        "schedule_.steps[buffer][r] + counts[r]",
        "schedule_.steps[buffer][0] + counts[r]",
        r"NEVER WRITTEN: .*steps\[\d\]|DEADLOCK",
    ),
    "LoadsPastTheEnd": (
        "if (place < 0 || place >= Loads) return;",
        "if (place < 0) return;",
        r"RACE: .*scheduler: store to (chunks|loads|steps)\[\d\]",
    ),
    "LoadsBeforeTheBeginning": (
        "if (place < 0 || place >= Loads) return;",
        "if (place >= Loads) return;",
        r"RACE: .*scheduler: store to (origins|loads)\[\d\]",
    ),
    # what a chunk says
    "FirstNotSaid": (
        "uint32_t flags = Chunk::kFirst;",
        "uint32_t flags = 0;",
        A_CONSUMER_WAITS + r" resident_full\[0\] use 0",
    ),
    "FirstSaidOfEveryChunk": (
        "close(); flags = 0;",
        "close();",
        A_PRODUCER_WAITS + r" resident_empty\[\d\]",
    ),
    "FinishNotSaid": (
        "open({{}, 0, 0, Chunk::kFinished}); close();",
        "",
        A_PRODUCER_WAITS + r" schedule_full\[\d\]",
    ),
    "NothingNotSaid": (
        "if (here == 0 && !ends) break;",
        "if (here == 0) break;",
        "DEADLOCK|WRONG NUMBERS",
    ),
    # steps of consumers
    "NextChunkForTheEnd": (
        "ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk",
        "ConsumerStep::kNextChunk",
        r"DEADLOCK: .*(producer0 waits for resident_empty|consumer\d waits for schedule_full)",
    ),
    "EndForTheNextChunk": (
        "ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk",
        "ConsumerStep::kDone",
        r"LOADS STILL IN FLIGHT|DEADLOCK|RACE",
    ),
    "NothingAtTheEnd": (
        "schedule_.steps[buffer][r][counts[r]].set(ConsumerStep::of(then));",
        ";",
        r"(NEVER WRITTEN|RACE): .*load from steps\[\d\]|DEADLOCK",
    ),
    "ComputedSkipped": (
        "const uint32_t steps = computed |",
        "const uint32_t steps = (computed & computed - 1) |",
        "WRONG NUMBERS|DEADLOCK|RACE|PHASE ALIAS",
    ),
    "ComputedPassed": (
        "computed >> lane & 1 ? ConsumerStep::kCompute : ConsumerStep::kSkip",
        "ConsumerStep::kSkip",
        "WRONG NUMBERS|DEADLOCK",
    ),
    "PassedOwned": (
        "computed >> lane & 1 ? ConsumerStep::kCompute : ConsumerStep::kSkip",
        "ConsumerStep::kCompute",
        "WRONG NUMBERS|DEADLOCK",
    ),
    "WindowsForgotten": (
        "computed | (first_of_empty_windows(computed) & there)",
        "computed",
        r"PHASE ALIAS: consumer\d waits for (both|first|second)_full"
        r"|DEADLOCK: .*consumer\d waits for schedule_full",
    ),
    "StoppingNotSaid": (
        "waiting[lane] |= 1u << r;",
        ";",
        r"TOO MANY ARRIVALS on (both|first|second)_empty|RACE|PHASE ALIAS",
    ),
    "StoppingSaidOfAll": (
        "waiting[lane] |= 1u << r;",
        "waiting[lane] |= ~0u >> 32 - Rows;",
        A_PRODUCER_WAITS + r" (both|first|second)_empty",
    ),
    "FlushesForgotten": (
        "first_number_ + from + lane - held >= Second;",
        "false;",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "FlushesOneTooLate": (
        "first_number_ + from + lane - held >= Second;",
        "first_number_ + from + lane - held > Second;",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "HeldInTheLastWorkTile": (
        "held_[r] = INT_MAX;",
        "if (next_ == 0) held_[r] = INT_MAX;",
        "DEADLOCK|WRONG NUMBERS",
    ),
    "HeldForgotten": (
        "if (computed) held_[r] =",
        "if (false) held_[r] =",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "LoadsOfEveryChunkAlike": (
        "first_number_ += loads;",
        "",
        "RACE|DEADLOCK|PHASE ALIAS|NEVER WRITTEN",
    ),
}

# Found where a work tile has several heads, in the pass over keys.
IN_HEADS: MutantTable = {
    "FirstHeadFoundTwice": (
        "find(work.batch, bitmaps + h * size, word);",
        "find(work.batch, bitmaps, word);",
        "WRONG NUMBERS",
    ),
    "FirstHeadSaidTwice": (
        "open({work, head + h, here, flags});",
        "open({work, head, here, flags});",
        "WRONG NUMBERS",
    ),
    "EndOfEachHead": (
        "const bool last = h == heads - 1 && (word",
        "const bool last = (word",
        "LOADS STILL IN FLIGHT|DEADLOCK|RACE",
    ),
}
