# SPDX-License-Identifier: Apache-2.0
"""Bugs in where consumers stop, in slots.h, for test_backward_bugs.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a bug has several effects, the schedule decides which comes
first.
"""

from __future__ import annotations

from mutants.bugs_in_rings import OVERWRITTEN, PRODUCER_STUCK, TOO_FREE
from mutants.planted_bugs import Bugs

WORK_LEFT = "DEADLOCK|LOADS STILL IN FLIGHT|WRONG NUMBERS"

IN_STOPS: Bugs = {
    # the list and its pages
    "ListNotAwaited": (
        "plan_.full[buffer].wait(chunk_ / Plan::kBuffers);",
        "",
        r"(NEVER WRITTEN|RACE): .*load from stops\[\d\]",
    ),
    "ListAwaitedForAnEarlierUse": (
        "plan_.full[buffer].wait(chunk_ / Plan::kBuffers);",
        "plan_.full[buffer].wait(chunk_ / Plan::kBuffers - 1);",
        r"(NEVER WRITTEN|RACE): .*load from stops\[\d\]"
        r"|PHASE ALIAS: consumer\d waits for plan_full",
    ),
    "ListOfTheOtherBuffer": (
        "plan_.stops[buffer][w_];",
        "plan_.stops[1 - buffer][w_];",
        r"(NEVER WRITTEN|RACE): .*load from stops\[\d\]",
    ),
    "ListOfAnotherConsumer": (
        "plan_.stops[buffer][w_];",
        "plan_.stops[buffer][w_ == 0 ? 1 : 0];",
        rf"{TOO_FREE}|{WORK_LEFT}",
    ),
    "ListNotBegun": (
        "stops_ = plan_.stops[buffer][w_]; next_ = 0;",
        "stops_ = plan_.stops[buffer][w_];",
        r"(NEVER WRITTEN|RACE): .*load from stops\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "ItemNotOpened": (
        "open(); return own(take());",
        "if (chunk_ == 0) open(); return own(take());",
        r"(NEVER WRITTEN|RACE): .*stops\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "PageNotTurned": (
        "give_back(); open(); stop = take();",
        "give_back(); stop = take();",
        r"(NEVER WRITTEN|RACE): .*stops\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "PageNotGivenBack": (
        "give_back(); open(); stop = take();",
        "++chunk_; open(); stop = take();",
        r"DEADLOCK: .*planner waits for plan_empty\[\d\] use 0 .* (128|256|384) of \d+ arrivals",
    ),
    "PageGivenBackTwice": (
        "give_back(); open(); stop = take();",
        "give_back(); --chunk_; give_back(); open(); stop = take();",
        r"TOO MANY ARRIVALS on plan_empty|RACE: .*planner: store to|PHASE ALIAS",
    ),
    "PageGivenBackByOneThread": (
        "plan_.empty[chunk_++ % Plan::kBuffers].arrive_all();",
        "if (elect_one()) plan_.empty[chunk_ % Plan::kBuffers].arrive_one(); ++chunk_;",
        r"DEADLOCK: .*planner waits for plan_empty\[\d\] use 0 .* (127|254|381) of \d+ arrivals",
    ),
    "EveryPageGivenBackInOneBuffer": (
        "plan_.empty[chunk_++ % Plan::kBuffers].arrive_all();",
        "plan_.empty[0].arrive_all(); ++chunk_;",
        r"TOO MANY ARRIVALS on plan_empty|DEADLOCK: .*planner waits for plan_empty",
    ),
    "PageTakenForTheEnd": (
        "stop = turned(stop); while",
        "while",
        r"DEADLOCK|LOADS STILL IN FLIGHT|RACE",
    ),
    "PageAfterPassesNotTurned": (
        "stop = turned(take());",
        "stop = take();",
        r"DEADLOCK|LOADS STILL IN FLIGHT|RACE",
    ),
    "LastPageNotGivenBack": (
        "void end_item() { give_back(); }",
        "void end_item() { ++chunk_; }",
        r"DEADLOCK: .*planner waits for plan_empty",
    ),
    "LastPageGivenBackTwice": (
        "void end_item() { give_back(); }",
        "void end_item() { give_back(); --chunk_; give_back(); }",
        r"TOO MANY ARRIVALS on plan_empty|RACE: .*planner: store to|PHASE ALIAS",
    ),
    "PageGivenBackBeforeItIsRead": (
        "stop = turned(stop); while",
        "give_back(); --chunk_; stop = turned(stop); while",
        r"TOO MANY ARRIVALS on plan_empty|RACE: .*planner: store to|PHASE ALIAS",
    ),
    # passes
    "FirstPassedAlone": (
        "while (stop.is(Stop::kPass)) {",
        "if (stop.is(Stop::kPass)) {",
        WORK_LEFT,
    ),
    "PassedTakenForItsOwn": (
        "while (stop.is(Stop::kPass)) {",
        "while (false) {",
        WORK_LEFT,
    ),
    "PassedFirstNotAwaited": (
        "rings_.wait_first(stop);",
        "",
        rf"TOO MANY ARRIVALS on first_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
    "PassedBothNotAwaited": (
        "rings_.wait_together(stop);",
        "",
        rf"TOO MANY ARRIVALS on both_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
    "PassedFirstNotReleased": (
        "rings_.release_first(stop);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "PassedSecondNotReleased": (
        "rings_.release_second(stop);",
        "",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "OwnNotAwaited": (
        "if (stop.is(Stop::kOwn)) wait(stop);",
        "",
        rf"TOO MANY ARRIVALS|PHASE ALIAS|(RACE|NEVER WRITTEN): |{OVERWRITTEN}",
    ),
    "OwnNotLookedFor": (
        "open(); return own(take());",
        "open(); return take();",
        WORK_LEFT,
    ),
    # drains
    "OneDrainAlone": (
        "while (stop.is(Stop::kDrain)) stop = own(take());",
        "if (stop.is(Stop::kDrain)) stop = own(take());",
        WORK_LEFT,
    ),
    "RunEndsTheItem": (
        "while (stop.is(Stop::kDrain)) stop = own(take());",
        "",
        WORK_LEFT,
    ),
    "PassedAfterADrain": (
        "while (stop.is(Stop::kDrain)) stop = own(take());",
        "while (stop.is(Stop::kDrain)) stop = take();",
        WORK_LEFT,
    ),
    "RunGoesOnPastDrains": (
        "stop = turned(take()); } return stop;",
        "stop = turned(take()); } return stop.is(Stop::kDrain) ? own(take()) : stop;",
        PRODUCER_STUCK,
    ),
}

# Found in the pass over queries alone: in that over keys a consumer lets go of the second slot that
# it holds before the next of the first, so that nobody gets to pass a stage that is still held.
IN_PASSES: Bugs = {
    "PassedSecondNotAwaited": (
        "rings_.wait_second(stop);",
        "",
        rf"TOO MANY ARRIVALS on second_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
}

# How each pass of the backward goes on, found where slots are passed over and drained.
IN_RUNS: Bugs = {
    "PassesNotLookedFor": (
        "next = there ? after : stops_.own(after, wait);",
        "next = after; if (!there && next.is(Stop::kOwn)) wait(next);",
        WORK_LEFT,
    ),
    "PassesOfARunNotLookedFor": (
        "Stop next = stops_.own(stops_.take(), wait);",
        "Stop next = stops_.take(); if (next.is(Stop::kOwn)) wait(next);",
        WORK_LEFT,
    ),
    "DrainsTakenForTheEnd": (
        "held = stops_.next_run(next);",
        "held = next;",
        WORK_LEFT,
    ),
}
