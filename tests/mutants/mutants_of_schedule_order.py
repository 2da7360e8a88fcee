# SPDX-License-Identifier: Apache-2.0
"""Mutants of tile_scheduler.h that are found by what the schedule is, for test_tile_scheduler.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable

# Where nothing is written, the buffer still holds another step, or nothing yet.
ANOTHER_STEP = r"WRONG (TILE|STEPS|ROWS)|NEVER WRITTEN: .*load from loads\[\d\]"

IN_ORDER: MutantTable = {
    # where a step lies
    "OneLoadTooFar": (
        "schedule_.loads[buffer][place].set(",
        "schedule_.loads[buffer][place + 1].set(",
        r"RACE: .*(loads|chunks|steps)\[\d\]|" + ANOTHER_STEP,
    ),
    "LoadsOfARowInOnePlace": (
        "rank = done[r] + popcount(assigned[r] & below(lane));",
        "rank = done[r];",
        ANOTHER_STEP,
    ),
    "LoadsOfRowsInOnePlace": (
        "int other = 0; other < Rows; ++other) place +=",
        "int other = row; other == row; ++other) place +=",
        ANOTHER_STEP,
    ),
    # tiles that all rows selected come first
    "SharedInOnePlace": (
        "shared_done += popcount(shared);",
        "",
        ANOTHER_STEP,
    ),
    "SharedLast": (
        "shared_total_ + place_of(row, rank, total)",
        "place_of(row, rank, total)",
        ANOTHER_STEP,
    ),
    "SharedTwice": (
        "open &= ~shared;",
        "",
        r"WRONG CHUNK|RACE|" + ANOTHER_STEP,
    ),
    "OwnersForgotten": (
        "waiting[lane], written[lane].flags()));",
        "waiting[lane]));",
        "WRONG OWNERS",
    ),
    "LoadsOfTwoRows": (
        "assigned_[r][lane] |= wanted_[r][lane] & open; open &= ~wanted_[r][lane];",
        "assigned_[r][lane] |= wanted_[r][lane] & open;",
        r"WRONG CHUNK|" + ANOTHER_STEP,
    ),
    "LoadsOfEarlierWordsForgotten": (
        "done[r] += popcount(assigned[r]);",
        ";",
        ANOTHER_STEP,
    ),
    "TiesInOnePlace": (
        "- (other < row ? 0 : 1)) / 2;",
        ") / 2;",
        ANOTHER_STEP,
    ),
    "LoadsAtTheirEnds": (
        "(2 * rank + 1) * total_[other].count",
        "(2 * rank + 2) * total_[other].count",
        ANOTHER_STEP,
    ),
    "QuotientRoundedDown": (
        "(1u << 31) / static_cast<unsigned>(count) + 1",
        "(1u << 31) / static_cast<unsigned>(count)",
        ANOTHER_STEP,
    ),
    "QuotientRoundedUp": (
        "(1u << 31) / static_cast<unsigned>(count) + 1",
        "(1u << 31) / static_cast<unsigned>(count) + 4096",
        ANOTHER_STEP,
    ),
    "RowsOneAfterTheOther": (
        "place += total.quotient((2 * rank + 1) * total_[other].count + total.count -"
        " (other < row ? 0 : 1)) / 2;",
        "place += other < row ? total_[other].count : other == row ? rank : 0;",
        "UNEVEN ORDER",
    ),
    "LoadsOfTheFirstRowThatWants": (
        "assigned_[r][lane] = wanted_[r][lane] & open & every(r);",
        "assigned_[r][lane] = 0;",
        "UNEVEN ORDER",
    ),
    # which tile it is, and whose
    "FirstWordsTiles": (
        "TileLoad::wanted((word + j) * kWordBits + lane, owners)",
        "TileLoad::wanted(j * kWordBits + lane, owners)",
        "WRONG (TILE|STEPS)",
    ),
    "OwnersOnlyWhereAssigned": (
        "owners |= (wanted[r] >> lane & 1) << r;",
        "owners |= (assigned[r] >> lane & 1) << r;",
        "WRONG STEPS: it skips what it computes|WRONG STEPS: neither compute nor skip",
    ),
    "NeighboursAlongW": (
        "tile_at(rows_, work.first_place + r, work.axis);",
        "tile_at(rows_, work.first_place + r, kAlongW);",
        "WRONG (CHUNK|STEPS|TILE)",
    ),
    "FirstWordsFoundAgain": (
        "const int at = word + lane, left",
        "const int at = lane, left",
        "WRONG (CHUNK|STEPS|TILE)",
    ),
    "TextForgotten": (
        "tiles_[r] >= 0 && lane == j ? text : 0;",
        "0;",
        "WRONG (CHUNK|TILE)",
    ),
    "TextForIdleRows": (
        "tiles_[r] >= 0 && lane == j ? text : 0;",
        "lane == j ? text : 0;",
        "WRONG STEPS",
    ),
    "TextWithoutTokens": (
        "columns_.is_text(tile) && columns_.rows(columns_.place(tile), batch) != 0;",
        "columns_.is_text(tile);",
        "WRONG (CHUNK|TILE)",
    ),
    "TextOfTheFirstVideo": (
        "columns_.rows(columns_.place(tile), batch) != 0;",
        "columns_.rows(columns_.place(tile), 0) != 0;",
        "WRONG (CHUNK|TILE)",
    ),
    "TextWantsPastTheVideo": (
        "left < kWordBits ? below(left) : ~0u",
        "~0u",
        "WRONG (CHUNK|TILE)",
    ),
    "TextWantsNoPartOfAWord": (
        "left < kWordBits ? below(left) : ~0u",
        "left < kWordBits ? 0 : ~0u",
        "WRONG (CHUNK|TILE)",
    ),
    # whose rows and where from
    "OriginOfTheWorkTilesHead": (
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
        "columns_.rows(columns_.place(written[lane].wanted_tile()), batch);",
        "columns_.rows(columns_.place(written[lane].wanted_tile()), 0);",
        "WRONG ROWS",
    ),
    "RowsOfAnotherTile": (
        "columns_.rows(columns_.place(written[lane].wanted_tile()), batch);",
        "columns_.rows(columns_.place(written[0].wanted_tile()), batch);",
        "WRONG ROWS",
    ),
    # steps of consumers
    "ComputedOfTheFirstLanesForgotten": (
        "const uint32_t steps = computed |",
        "const uint32_t steps = (computed & ~1u) |",
        "WRONG STEPS: it skips what it computes",
    ),
    "WindowsNotLookedAt": (
        "computed | (first_of_empty_windows(computed) & there)",
        "computed",
        "WRONG STEPS: it skips too many",
    ),
    "LastWindowForgotten": (
        "~bits & 0x01010101",
        "~bits & 0x00010101",
        "WRONG STEPS: it skips too many",
    ),
    "WindowsPastTheEnd": (
        "(first_of_empty_windows(computed) & there)",
        "first_of_empty_windows(computed)",
        r"WRONG (STEPS|TILE|ROWS)|(RACE|NEVER WRITTEN): .*(loads|steps)\[\d\]",
    ),
    "WindowsTooShort": (
        "bits |= bits >> 4;",
        "",
        "WRONG STEPS: it takes a skip though a compute is near",
    ),
    "SkippedLikeComputed": (
        "computed >> lane & 1 ? ConsumerStep::kCompute : ConsumerStep::kSkip",
        "ConsumerStep::kCompute",
        "WRONG STEPS: neither compute nor skip",
    ),
    "NoFlushes": (
        "if (flush) to->set(ConsumerStep::of(ConsumerStep::kFlush));",
        "if (flush) to->set(ConsumerStep::of(ConsumerStep::kSkip));",
        "WRONG STEPS: no flush",
    ),
    "FlushesOfTheFirstRing": (
        "first_number_ + from + lane - held >= Second;",
        "first_number_ + from + lane - held >= First;",
        "WRONG STEPS",
    ),
    "FlushesFromSkipped": (
        "const uint32_t before = computed & below(lane);",
        "const uint32_t before = steps & below(lane);",
        "WRONG STEPS",
    ),
    "FlushesFromTheFirst": (
        "bitmap::highest(before)",
        "0",
        r"WRONG STEPS|RACE: .*steps\[\d\]",
    ),
    "HeldInEarlierLanesForgotten": (
        "if (computed) held_[r] =",
        "if (from == 0) held_[r] =",
        "WRONG STEPS",
    ),
    "FlushedWhereNothingIsHeld": (
        "held_[r] = INT_MAX;",
        "if (next_ == 0) held_[r] = INT_MAX;",
        "WRONG STEPS",
    ),
    "FlushesNotCounted": (
        "popcount(steps) + popcount(flushes);",
        "popcount(steps);",
        r"WRONG STEPS|NEVER WRITTEN: .*steps\[\d\]",
    ),
    "StepsOfEarlierLanesForgotten": (
        "counts[r] += popcount(steps)",
        "counts[r] = popcount(steps)",
        r"WRONG STEPS|NEVER WRITTEN: .*steps\[\d\]",
    ),
    "SecondOfTheFirstRing": (
        "RingUse::of<Second>(number), rows",
        "RingUse::of<First>(number), rows",
        "WRONG USE OF A RING",
    ),
    "LoadsOfTheChunk": (
        "const int number = first_number_ + from + lane, flush",
        "const int number = from + lane, flush",
        "WRONG USE OF A RING",
    ),
    "LoadsOfTheFirstLanes": (
        "const int number = first_number_ + from + lane, flush",
        "const int number = first_number_ + lane, flush",
        "WRONG USE OF A RING",
    ),
}
