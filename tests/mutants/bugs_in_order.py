# SPDX-License-Identifier: Apache-2.0
"""Bugs in planner.h that are found by what the plan is, for test_plan.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from mutants.planted_bugs import Bugs

# Where nothing is written, the buffer still holds another step, or nothing yet.
ANOTHER_STEP = r"WRONG (TILE|STOPS|ROWS)|NEVER WRITTEN: .*load from steps\[\d\]"

IN_ORDER: Bugs = {
    # where a step lies
    "OneStepTooFar": (
        "plan_.steps[buffer][place].set(",
        "plan_.steps[buffer][place + 1].set(",
        r"RACE: .*(steps|chunks|stops)\[\d\]|" + ANOTHER_STEP,
    ),
    "TurnsOfARowInOnePlace": (
        "rank = done[r] + popcount(turns[r] & below(lane));",
        "rank = done[r];",
        ANOTHER_STEP,
    ),
    "TurnsOfRowsInOnePlace": (
        "int other = 0; other < Rows; ++other) place +=",
        "int other = row; other == row; ++other) place +=",
        ANOTHER_STEP,
    ),
    "TurnsOfTwoRows": (
        "turns_[r][lane] |= wanted_[r][lane] & open; open &= ~wanted_[r][lane];",
        "turns_[r][lane] |= wanted_[r][lane] & open;",
        r"WRONG CHUNK|" + ANOTHER_STEP,
    ),
    "TurnsOfEarlierWordsForgotten": (
        "done[r] += popcount(turns[r]);",
        ";",
        ANOTHER_STEP,
    ),
    "TiesInOnePlace": (
        "- (other < row ? 0 : 1)) / 2;",
        ") / 2;",
        ANOTHER_STEP,
    ),
    "TurnsAtTheirEnds": (
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
        "UNEVEN TURNS",
    ),
    "TurnsOfTheFirstRowThatWants": (
        "turns_[r][lane] = wanted_[r][lane] & every(r);",
        "turns_[r][lane] = 0;",
        "UNEVEN TURNS",
    ),
    # which tile it is, and whose
    "FirstWordsTiles": (
        "PlanStep::wanted((word + j) * kWordBits + lane, owners)",
        "PlanStep::wanted(j * kWordBits + lane, owners)",
        "WRONG (TILE|STOPS)",
    ),
    "OwnersOnlyInTurn": (
        "owners |= (wanted[r] >> lane & 1) << r;",
        "owners |= (turns[r] >> lane & 1) << r;",
        "WRONG STOPS: it passes over its own|WRONG STOPS: neither own nor passed",
    ),
    "NeighboursAlongW": (
        "tile_at(rows_, work.first_place + r, work.axis);",
        "tile_at(rows_, work.first_place + r, kAlongW);",
        "WRONG (CHUNK|STOPS|TILE)",
    ),
    "FirstWordsFoundAgain": (
        "const int at = word + lane, left",
        "const int at = lane, left",
        "WRONG (CHUNK|STOPS|TILE)",
    ),
    "TextForgotten": (
        "tiles_[r] >= 0 && lane == j ? text : 0;",
        "0;",
        "WRONG (CHUNK|TILE)",
    ),
    "TextForIdleRows": (
        "tiles_[r] >= 0 && lane == j ? text : 0;",
        "lane == j ? text : 0;",
        "WRONG STOPS",
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
        "columns_.rows(columns_.place(written[lane].wanted_tile()), batch);",
        "columns_.rows(columns_.place(written[lane].wanted_tile()), 0);",
        "WRONG ROWS",
    ),
    "RowsOfAnotherTile": (
        "columns_.rows(columns_.place(written[lane].wanted_tile()), batch);",
        "columns_.rows(columns_.place(written[0].wanted_tile()), batch);",
        "WRONG ROWS",
    ),
    # where consumers stop
    "OwnOfTheFirstLanesForgotten": (
        "const uint32_t stops = own |",
        "const uint32_t stops = (own & ~1u) |",
        "WRONG STOPS: it passes over its own",
    ),
    "WindowsNotLookedAt": (
        "own | (first_of_empty_windows(own) & there)",
        "own",
        "WRONG STOPS: it passes over too many",
    ),
    "LastWindowForgotten": (
        "~bits & 0x01010101",
        "~bits & 0x00010101",
        "WRONG STOPS: it passes over too many",
    ),
    "WindowsPastTheEnd": (
        "(first_of_empty_windows(own) & there)",
        "first_of_empty_windows(own)",
        r"WRONG (STOPS|TILE|ROWS)|(RACE|NEVER WRITTEN): .*(steps|stops)\[\d\]",
    ),
    "WindowsTooShort": (
        "bits |= bits >> 4;",
        "",
        "WRONG STOPS: it passes one though its own are near",
    ),
    "PassedLikeOwn": (
        "own >> lane & 1 ? Stop::kOwn : Stop::kPass",
        "Stop::kOwn",
        "WRONG STOPS: neither own nor passed",
    ),
    "NoDrains": (
        "if (drain) to->set(Stop::of(Stop::kDrain));",
        "if (drain) to->set(Stop::of(Stop::kPass));",
        "WRONG STOPS: no drain",
    ),
    "DrainsOfTheFirstRing": (
        "first_slot_ + from + lane - held >= Second;",
        "first_slot_ + from + lane - held >= First;",
        "WRONG STOPS",
    ),
    "DrainsFromPassed": (
        "const uint32_t before = own & below(lane);",
        "const uint32_t before = stops & below(lane);",
        "WRONG STOPS",
    ),
    "DrainsFromTheFirst": (
        "bitmap::highest(before)",
        "0",
        r"WRONG STOPS|RACE: .*stops\[\d\]",
    ),
    "HeldInEarlierLanesForgotten": (
        "if (own) held_[r] =",
        "if (from == 0) held_[r] =",
        "WRONG STOPS",
    ),
    "DrainedWhereNothingIsHeld": (
        "held_[r] = INT_MAX;",
        "if (next_ == 0) held_[r] = INT_MAX;",
        "WRONG STOPS",
    ),
    "DrainsNotCounted": (
        "popcount(stops) + popcount(drains);",
        "popcount(stops);",
        r"WRONG STOPS|NEVER WRITTEN: .*stops\[\d\]",
    ),
    "StopsOfEarlierLanesForgotten": (
        "counts[r] += popcount(stops)",
        "counts[r] = popcount(stops)",
        r"WRONG STOPS|NEVER WRITTEN: .*stops\[\d\]",
    ),
    "SecondOfTheFirstRing": (
        "RingUse::of<Second>(slot), rows",
        "RingUse::of<First>(slot), rows",
        "WRONG USE OF A RING",
    ),
    "SlotsOfTheChunk": (
        "const int slot = first_slot_ + from + lane, drain",
        "const int slot = from + lane, drain",
        "WRONG USE OF A RING",
    ),
    "SlotsOfTheFirstLanes": (
        "const int slot = first_slot_ + from + lane, drain",
        "const int slot = first_slot_ + lane, drain",
        "WRONG USE OF A RING",
    ),
}
