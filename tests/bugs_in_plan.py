# SPDX-License-Identifier: Apache-2.0
"""Bugs in the plan, for test_backward_bugs.py and test_plan.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

Bugs = dict[str, tuple[str, str, str]]

# Found in both passes of the backward.
IN_PLAN: Bugs = {
    # chunks handed over
    "PlanFullNotAwaited": (
        "full[n % kBuffers].wait(n / kBuffers); return",
        "return",
        r"(NEVER WRITTEN|RACE): .*load from chunks\[\d\]",
    ),
    "PlanFullAwaitedForAnEarlierUse": (
        "full[n % kBuffers].wait(n / kBuffers);",
        "full[n % kBuffers].wait(n / kBuffers - 1);",
        r"(NEVER WRITTEN|RACE|PHASE ALIAS): .*(chunks|plan_full)\[\d\]",
    ),
    "ReadBeforePlanFull": (
        "full[n % kBuffers].wait(n / kBuffers); return chunk(n);",
        "const Chunk early = chunk(n); full[n % kBuffers].wait(n / kBuffers); return early;",
        r"(NEVER WRITTEN|RACE): .*load from chunks\[\d\]",
    ),
    "PlanFullNotArrived": (
        "plan_.full[next_++ % plan_.kBuffers].arrive_warp();",
        "next_++;",
        r"DEADLOCK: .*producer waits for plan_full\[0\] use 0 .* 32 of 32 arrivals missing",
    ),
    "PlanFullByOneLane": (
        "plan_.full[next_++ % plan_.kBuffers].arrive_warp();",
        "if (elect_one()) plan_.full[next_++ % plan_.kBuffers].arrive_one();",
        r"DEADLOCK: .*producer waits for plan_full\[0\] use 0 .* 31 of 32 arrivals missing",
    ),
    "PlanFullByOneLaneForAll": (
        "plan_.full[next_++ % plan_.kBuffers].arrive_warp();",
        "for (int i = 0; elect_one() && i < 32; ++i)"
        " plan_.full[next_ % plan_.kBuffers].arrive_one(); ++next_;",
        r"MISSING NAMED BARRIER .*planner: store to .*producer: load from",
    ),
    "PlanFullOfOneLane": (
        'full[i].init(kWarpThreads, "plan_full", i);',
        'full[i].init(1, "plan_full", i);',
        "TOO MANY ARRIVALS on plan_full",
    ),
    "PlanFullOfAWarpgroup": (
        'full[i].init(kWarpThreads, "plan_full", i);',
        'full[i].init(kWarpgroupThreads, "plan_full", i);',
        r"DEADLOCK: .*producer waits for plan_full\[0\] use 0 .* 96 of 128 arrivals missing",
    ),
    "PlanFullTwice": (
        "plan_.full[next_++ % plan_.kBuffers].arrive_warp();",
        "plan_.full[next_ % plan_.kBuffers].arrive_warp();"
        " plan_.full[next_++ % plan_.kBuffers].arrive_warp();",
        r"PHASE ALIAS: producer waits for plan_full\[\d\]",
    ),
    "ToldBeforeWritten": (
        "write(word, done, left == 0 ? done + here - 1 : -1); close();",
        "close(); write(word, done, left == 0 ? done + here - 1 : -1);",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]",
    ),
    # ... and given back
    "PlanEmptyNotAwaited": (
        "plan_.empty[buffer].wait(next_ / plan_.kBuffers - 1);",
        "",
        r"RACE: .*planner: store to chunks\[\d\]",
    ),
    "PlanEmptyAwaitedForThisUse": (
        "plan_.empty[buffer].wait(next_ / plan_.kBuffers - 1);",
        "plan_.empty[buffer].wait(next_ / plan_.kBuffers);",
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0",
    ),
    "PlanEmptyNotArrived": (
        "empty[n % kBuffers].arrive_one();",
        "",
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0",
    ),
    "PlanEmptyTwice": (
        "empty[n % kBuffers].arrive_one();",
        "empty[n % kBuffers].arrive_one(); empty[n % kBuffers].arrive_one();",
        r"DEADLOCK: .*planner waits for plan_empty\[\d\] use 0",
    ),
    "PlanEmptyOfAWarp": (
        'empty[i].init(1, "plan_empty", i);',
        'empty[i].init(kWarpThreads, "plan_empty", i);',
        r"DEADLOCK: .*planner waits for plan_empty\[0\] use 0 .* 31 of 32 arrivals missing",
    ),
    "PlanEmptyNotInitialised": (
        'empty[i].init(1, "plan_empty", i);',
        "",
        "MBARRIER NOT INITIALISED: used by (planner|producer)",
    ),
    # what lies in which buffer
    "StepsReadInTheOtherBuffer": (
        "return steps[n % kBuffers][i].get();",
        "return steps[(n + 1) % kBuffers][i].get();",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]",
    ),
    "StepsWrittenInTheOtherBuffer": (
        "plan_.steps[next_ % plan_.kBuffers][place - begin]",
        "plan_.steps[(next_ + 1) % plan_.kBuffers][place - begin]",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]",
    ),
    "OriginsOfTheOtherBuffer": (
        "origins[n % kBuffers].get()",
        "origins[(n + 1) % kBuffers].get()",
        r"(NEVER WRITTEN|RACE): .*origins\[\d\]",
    ),
    "OriginsNotSaid": (
        "plan_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),"
        " origin_of(second_, chunk.head, chunk.work.batch)});",
        "",
        r"NEVER WRITTEN: .*load from origins\[\d\]",
    ),
    "StepsPastTheEnd": (
        "if (place < begin || place >= begin + Steps) return;",
        "if (place < begin) return;",
        r"RACE: .*planner: store to (chunks|steps)\[\d\]",
    ),
    "StepsBeforeTheBeginning": (
        "if (place < begin || place >= begin + Steps) return;",
        "if (place < 0 || place >= begin + Steps) return;",
        r"RACE: .*planner: store to (origins|steps)\[\d\]",
    ),
    # what a chunk and a step say
    "FirstNotSaid": (
        "uint32_t flags = Flags::kFirst;",
        "uint32_t flags = 0;",
        r"DEADLOCK: .*consumer0 waits for (kv|q)_full\[0\] use 0",
    ),
    "FirstSaidOfEveryChunk": (
        "close(); flags = 0;",
        "close();",
        r"DEADLOCK: .*producer waits for (kv|q)_empty\[\d\]",
    ),
    "LastFlagLost": (
        "owners | (place == last ? kLast : 0)",
        "owners",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "LastFlagOnEveryChunk": (
        "left == 0 ? done + here - 1 : -1",
        "done + here - 1",
        "LOADS STILL IN FLIGHT|DEADLOCK: .*producer waits for slot_empty",
    ),
    "LastFlagPastTheEnd": (
        "left == 0 ? done + here - 1 : -1",
        "left == 0 ? done + here : -1",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "StepsNotCountedDown": (
        "left -= here;",
        "",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "NothingNotSaid": (
        "if (left == 0) { open({work, head, 0, flags}); return close(); }",
        "",
        "WRONG NUMBERS",
    ),
    "StopNotSaid": (
        "open({{}, 0, 0, Flags::kStop}); close();",
        "",
        r"DEADLOCK: .*producer waits for plan_full\[\d\]",
    ),
    "OwnersOnlyInTurn": (
        "owners |= (wanted[r] >> lane & 1) << r;",
        "owners |= (turn[r] >> lane & 1) << r;",
        "WRONG NUMBERS",
    ),
    "PlaceInTilesNotTokens": (
        "w * tile.w}",
        "w}",
        "WRONG NUMBERS",
    ),
}

# Found where an item has several heads, in the pass over keys.
IN_HEADS: Bugs = {
    "FirstHeadCountedTwice": (
        "left += count(work, bitmaps + h * size);",
        "left += count(work, bitmaps);",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "FirstHeadFoundTwice": (
        "find(work, bitmaps + h * size, word, Words);",
        "find(work, bitmaps, word, Words);",
        "DEADLOCK: .*consumer0 waits for slot_full",
    ),
    "FirstHeadSaidTwice": (
        "open({work, head + h, here, flags});",
        "open({work, head, here, flags});",
        "WRONG NUMBERS",
    ),
}
