# SPDX-License-Identifier: Apache-2.0
"""Bugs in the plan, for test_backward_bugs.py and test_plan.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from planted_bugs import Bugs

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
        r"(NEVER WRITTEN|RACE|PHASE ALIAS|DEADLOCK): .*(chunks|producer waits for plan_full)\[\d\]",
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
        r"(PHASE ALIAS|DEADLOCK): .*producer waits for plan_full\[\d\]",
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
        r"(PHASE ALIAS|DEADLOCK|RACE): .*(planner waits for plan_empty|chunks)\[\d\]",
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

# Where nothing is written, the buffer still holds another step, or nothing yet.
ANOTHER_STEP = r"WRONG (TILE|OWNERS|LAST FLAG)|NEVER WRITTEN: .*load from steps\[\d\]"

# Found by what the plan is, in tests/cpp/plan.cpp.
IN_ORDER: Bugs = {
    # where a step lies
    "OneStepTooFar": (
        "[place - begin].set(",
        "[place - begin + 1].set(",
        r"RACE: .*(steps|chunks)\[\d\]|" + ANOTHER_STEP,
    ),
    "TurnsOfARowInOnePlace": (
        "place_of(r, done[r] + popcount(turn[r] & ((1u << lane) - 1)), total)",
        "place_of(r, done[r], total)",
        ANOTHER_STEP,
    ),
    "TurnsOfRowsInOnePlace": (
        "place += static_cast<int>((limit / static_cast<unsigned>(total[row]) + 1) / 2);",
        "",
        ANOTHER_STEP,
    ),
    "TurnsOfTwoRows": (
        "turns_[r][lane] |= own_[r][lane] & open; open &= ~own_[r][lane];",
        "turns_[r][lane] |= own_[r][lane] & open;",
        ANOTHER_STEP,
    ),
    "TurnsOfEarlierWordsForgotten": (
        "done[r] += popcount(turn[r]);",
        ";",
        ANOTHER_STEP,
    ),
    "TiesInOnePlace": (
        "- (other < row ? 0 : 1);",
        ";",
        ANOTHER_STEP,
    ),
    "TurnsAtTheirEnds": (
        "(2 * rank + 1) * total[other]",
        "(2 * rank + 2) * total[other]",
        ANOTHER_STEP,
    ),
    "RowsOneAfterTheOther": (
        "place += static_cast<int>((limit / static_cast<unsigned>(total[row]) + 1) / 2);",
        "place += other < row ? total[other] : 0;",
        "UNEVEN TURNS",
    ),
    "TurnsOfTheFirstRowThatWants": (
        "turns_[r][lane] = own_[r][lane] & every(r);",
        "turns_[r][lane] = 0;",
        "UNEVEN TURNS",
    ),
    # which tile it is, and whose
    "FirstWordsTiles": (
        "columns_, (word + j) * kWordBits + lane,",
        "columns_, j * kWordBits + lane,",
        "WRONG TILE",
    ),
    "NeighboursAlongW": (
        "tile_at(rows_, work.first_place + r, work.axis);",
        "tile_at(rows_, work.first_place + r, kAlongW);",
        "WRONG (CHUNK|OWNERS|TILE)",
    ),
    "FirstWordsFoundAgain": (
        "const int at = word + lane, left",
        "const int at = lane, left",
        "WRONG (CHUNK|OWNERS|TILE)",
    ),
    "OneWordForEachLaneCounted": (
        "steps += count();",
        "steps = count();",
        "WRONG LAST FLAG",
    ),
    "TextForgotten": (
        "there && lane == j ? text : 0;",
        "0;",
        "WRONG (CHUNK|TILE)",
    ),
    "TextForIdleRows": (
        "there && lane == j ? text : 0;",
        "lane == j ? text : 0;",
        "WRONG OWNERS",
    ),
    "TextWithoutTokens": (
        "columns_.is_text(tile) && columns_.rows(columns_.place(tile), work.batch) != 0;",
        "columns_.is_text(tile);",
        "WRONG (CHUNK|TILE)",
    ),
    "TextOfTheFirstVideo": (
        "columns_.rows(columns_.place(tile), work.batch) != 0;",
        "columns_.rows(columns_.place(tile), 0) != 0;",
        "WRONG (CHUNK|TILE)",
    ),
    "TextWantsPastTheVideo": (
        "left < kWordBits ? (1u << left) - 1 : ~0u",
        "~0u",
        "WRONG (CHUNK|TILE)",
    ),
    "TextWantsNoPartOfAWord": (
        "left < kWordBits ? (1u << left) - 1 : ~0u",
        "left < kWordBits ? 0 : ~0u",
        "WRONG (CHUNK|TILE)",
    ),
    "ClipForgotten": (
        "uint64_t{at.clip} << kClip |",
        "",
        "WRONG PLACE",
    ),
    "LayerForgotten": (
        "static_cast<uint64_t>(in_tiles.t) << 32 |",
        "",
        "WRONG TILE",
    ),
    "SuffixPlacedInThePrefix": (
        "return {region, region == Region::Prefix ? w : sequence.prefix_tiles() + w,",
        "return {region, w,",
        "WRONG PLACE",
    ),
    "SuffixNumberedAsThePrefix": (
        "return grid.num_tiles() + (region == Region::Prefix ? w : sequence.prefix_tiles() + w);",
        "return grid.num_tiles() + w;",
        "WRONG TILE",
    ),
    # whose rows and where from
    "OriginOfTheItemsHead": (
        "origin_of(second_, chunk.head, chunk.work.batch)",
        "origin_of(second_, chunk.work.head, chunk.work.batch)",
        "WRONG ORIGIN",
    ),
    "OriginOfTheFirstVideo": (
        "origin_of(second_, chunk.head, chunk.work.batch)",
        "origin_of(second_, chunk.head, 0)",
        "WRONG ORIGIN",
    ),
    "RowsOfTheFirstVideo": (
        "columns.rows(at, chunk(n).work.batch)",
        "columns.rows(at, 0)",
        "WRONG ROWS",
    ),
}
