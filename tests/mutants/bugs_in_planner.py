# SPDX-License-Identifier: Apache-2.0
"""Bugs in planner.h that the backward's passes are stopped by, for test_backward_bugs.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from mutants.bugs_in_plan import A_CONSUMER_WAITS, A_PRODUCER_WAITS
from mutants.planted_bugs import Bugs

# Found in both passes.
IN_PLANNER: Bugs = {
    # chunks handed over
    "PlanFullNotArrived": (
        "plan_.full[next_++ % Plan::kBuffers].arrive_warp();",
        "next_++;",
        A_PRODUCER_WAITS + r" plan_full\[0\] use 0 .* 32 of 32 arrivals missing",
    ),
    "PlanFullByOneLane": (
        "plan_.full[next_++ % Plan::kBuffers].arrive_warp();",
        "if (elect_one()) plan_.full[next_++ % Plan::kBuffers].arrive_one();",
        A_PRODUCER_WAITS + r" plan_full\[0\] use 0 .* 31 of 32 arrivals missing",
    ),
    "PlanFullByOneLaneForAll": (
        "plan_.full[next_++ % Plan::kBuffers].arrive_warp();",
        "for (int i = 0; elect_one() && i < 32; ++i)"
        " plan_.full[next_ % Plan::kBuffers].arrive_one(); ++next_;",
        r"MISSING NAMED BARRIER .*planner: store to .*(producer|consumer)\d: load from",
    ),
    "PlanFullTwice": (
        "plan_.full[next_++ % Plan::kBuffers].arrive_warp();",
        "plan_.full[next_ % Plan::kBuffers].arrive_warp();"
        " plan_.full[next_++ % Plan::kBuffers].arrive_warp();",
        r"(PHASE ALIAS|DEADLOCK): .*(producer|consumer)\d waits for plan_full\[\d\]",
    ),
    "StepsToldBeforeWritten": (
        "write_steps(word, done); write_stops(work.batch, here, ends ? Stop::kEnd : Stop::kPage);"
        " close();",
        "close(); write_steps(word, done);"
        " write_stops(work.batch, here, ends ? Stop::kEnd : Stop::kPage);",
        r"(NEVER WRITTEN|RACE): .*(steps|stops)\[\d\]",
    ),
    "StopsToldBeforeWritten": (
        "write_stops(work.batch, here, ends ? Stop::kEnd : Stop::kPage); close();",
        "close(); write_stops(work.batch, here, ends ? Stop::kEnd : Stop::kPage);",
        r"(NEVER WRITTEN|RACE): .*(steps|stops)\[\d\]",
    ),
    # ... and given back
    "PlanEmptyNotAwaited": (
        "plan_.empty[buffer].wait(next_ / Plan::kBuffers - 1);",
        "",
        r"RACE: .*planner: store to (chunks|origins|steps|stops)\[\d\]",
    ),
    "PlanEmptyAwaitedForThisUse": (
        "plan_.empty[buffer].wait(next_ / Plan::kBuffers - 1);",
        "plan_.empty[buffer].wait(next_ / Plan::kBuffers);",
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0",
    ),
    # what lies in which buffer
    "OriginsNotSaid": (
        "plan_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),"
        " origin_of(second_, chunk.head, chunk.work.batch)});",
        "",
        r"NEVER WRITTEN: .*load from origins\[\d\]",
    ),
    "StepsWrittenInTheOtherBuffer": (
        "plan_.steps[buffer][place].set(",
        "plan_.steps[1 - buffer][place].set(",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]",
    ),
    "StopsWrittenInTheOtherBuffer": (
        "plan_.stops[buffer][r] + counts[r]",
        "plan_.stops[1 - buffer][r] + counts[r]",
        r"(NEVER WRITTEN|RACE): .*stops\[\d\]",
    ),
    "StopsOfOneConsumer": (
        "plan_.stops[buffer][r] + counts[r]",
        "plan_.stops[buffer][0] + counts[r]",
        r"NEVER WRITTEN: .*stops\[\d\]|DEADLOCK",
    ),
    "StepsPastTheEnd": (
        "if (place < 0 || place >= Steps) return;",
        "if (place < 0) return;",
        r"RACE: .*planner: store to (chunks|steps|stops)\[\d\]",
    ),
    "StepsBeforeTheBeginning": (
        "if (place < 0 || place >= Steps) return;",
        "if (place >= Steps) return;",
        r"RACE: .*planner: store to (origins|steps)\[\d\]",
    ),
    # what a chunk says
    "FirstNotSaid": (
        "uint32_t flags = Chunk::kFirst;",
        "uint32_t flags = 0;",
        A_CONSUMER_WAITS + r" own_full\[0\] use 0",
    ),
    "FirstSaidOfEveryChunk": (
        "close(); flags = 0;",
        "close();",
        A_PRODUCER_WAITS + r" own_empty\[\d\]",
    ),
    "StopNotSaid": (
        "open({{}, 0, 0, Chunk::kStop}); close();",
        "",
        A_PRODUCER_WAITS + r" plan_full\[\d\]",
    ),
    "NothingNotSaid": (
        "if (here == 0 && !ends) break;",
        "if (here == 0) break;",
        "DEADLOCK|WRONG NUMBERS",
    ),
    # where consumers stop
    "PageForTheEnd": (
        "ends ? Stop::kEnd : Stop::kPage",
        "Stop::kPage",
        r"DEADLOCK: .*(producer0 waits for own_empty|consumer\d waits for plan_full)",
    ),
    "EndForThePage": (
        "ends ? Stop::kEnd : Stop::kPage",
        "Stop::kEnd",
        r"LOADS STILL IN FLIGHT|DEADLOCK|RACE",
    ),
    "NothingAtTheEnd": (
        "plan_.stops[buffer][r][counts[r]].set(Stop::of(then));",
        ";",
        r"(NEVER WRITTEN|RACE): .*load from stops\[\d\]|DEADLOCK",
    ),
    "OwnPassedOver": (
        "const uint32_t stops = own |",
        "const uint32_t stops = (own & own - 1) |",
        "WRONG NUMBERS|DEADLOCK|RACE|PHASE ALIAS",
    ),
    "OwnPassed": (
        "own >> lane & 1 ? Stop::kOwn : Stop::kPass",
        "Stop::kPass",
        "WRONG NUMBERS|DEADLOCK",
    ),
    "PassedOwned": (
        "own >> lane & 1 ? Stop::kOwn : Stop::kPass",
        "Stop::kOwn",
        "WRONG NUMBERS|DEADLOCK",
    ),
    "WindowsForgotten": (
        "own | (first_of_empty_windows(own) & there)",
        "own",
        r"PHASE ALIAS: consumer\d waits for (both|first|second)_full"
        r"|DEADLOCK: .*consumer\d waits for plan_full",
    ),
    "StoppingNotSaid": (
        "stopping[lane] |= 1u << r;",
        ";",
        r"TOO MANY ARRIVALS on (both|first|second)_empty|RACE|PHASE ALIAS",
    ),
    "StoppingSaidOfAll": (
        "stopping[lane] |= 1u << r;",
        "stopping[lane] |= ~0u >> 32 - Rows;",
        A_PRODUCER_WAITS + r" (both|first|second)_empty",
    ),
    "DrainsForgotten": (
        "first_slot_ + from + lane - held >= Second;",
        "false;",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "DrainsOneTooLate": (
        "first_slot_ + from + lane - held >= Second;",
        "first_slot_ + from + lane - held > Second;",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "HeldInTheLastItem": (
        "held_[r] = INT_MAX;",
        "if (next_ == 0) held_[r] = INT_MAX;",
        "DEADLOCK|WRONG NUMBERS",
    ),
    "HeldForgotten": (
        "if (own) held_[r] =",
        "if (false) held_[r] =",
        A_PRODUCER_WAITS + r" (both|second)_empty",
    ),
    "SlotsOfEveryChunkAlike": (
        "first_slot_ += steps;",
        "",
        "RACE|DEADLOCK|PHASE ALIAS|NEVER WRITTEN",
    ),
}

# Found where an item has several heads, in the pass over keys.
IN_HEADS: Bugs = {
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
