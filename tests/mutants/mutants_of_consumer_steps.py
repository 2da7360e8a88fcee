# SPDX-License-Identifier: Apache-2.0
"""Mutants of the steps of consumers in rings.h, for test_backward_kernels.py.

Each is what the text is that a header has once, what becomes of it, and how that must be reported.
Spaces stand for any white space. Where a mutant has several effects, the schedule decides which
comes first.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable
from mutants.mutants_of_rings import OVERWRITTEN, PRODUCER_STUCK, TOO_FREE

WORK_LEFT = "DEADLOCK|LOADS STILL IN FLIGHT|WRONG NUMBERS"

IN_CONSUMER_STEPS: MutantTable = {
    # steps and their chunks
    "ListNotAwaited": (
        "schedule_.full[buffer].wait(chunk_ / TileSchedule::kBuffers);",
        "",
        r"(NEVER WRITTEN|RACE): .*load from steps\[\d\]",
    ),
    "ListAwaitedForAnEarlierUse": (
        "schedule_.full[buffer].wait(chunk_ / TileSchedule::kBuffers);",
        "schedule_.full[buffer].wait(chunk_ / TileSchedule::kBuffers - 1);",
        r"(NEVER WRITTEN|RACE): .*load from steps\[\d\]"
        r"|PHASE ALIAS: consumer\d waits for schedule_full",
    ),
    "ListOfTheOtherBuffer": (
        "schedule_.steps[buffer][w_];",
        "schedule_.steps[1 - buffer][w_];",
        r"(NEVER WRITTEN|RACE): .*load from steps\[\d\]",
    ),
    "ListOfAnotherConsumer": (
        "schedule_.steps[buffer][w_];",
        "schedule_.steps[buffer][w_ == 0 ? 1 : 0];",
        rf"{TOO_FREE}|{WORK_LEFT}",
    ),
    "ListNotBegun": (
        "steps_ = schedule_.steps[buffer][w_]; next_ = 0;",
        "steps_ = schedule_.steps[buffer][w_];",
        r"(NEVER WRITTEN|RACE): .*load from steps\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "WorkTileNotOpened": (
        "acquire_chunk(); return next_compute(take());",
        "if (chunk_ == 0) acquire_chunk(); return next_compute(take());",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "NextChunkNotEntered": (
        "release_chunk(); acquire_chunk(); step = take();",
        "release_chunk(); step = take();",
        r"(NEVER WRITTEN|RACE): .*steps\[\d\]|DEADLOCK|PHASE ALIAS|TOO MANY ARRIVALS",
    ),
    "NextChunkNotGivenBack": (
        "release_chunk(); acquire_chunk(); step = take();",
        "++chunk_; acquire_chunk(); step = take();",
        r"DEADLOCK: .*scheduler waits for schedule_empty\[\d\] use 0 .* (128|256|384) of \d+"
        r" arrivals",
    ),
    "NextChunkGivenBackTwice": (
        "release_chunk(); acquire_chunk(); step = take();",
        "release_chunk(); --chunk_; release_chunk(); acquire_chunk(); step = take();",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to|PHASE ALIAS",
    ),
    "NextChunkGivenBackByOneThread": (
        "schedule_.empty[chunk_++ % TileSchedule::kBuffers].arrive_all();",
        "if (elect_one()) schedule_.empty[chunk_ % TileSchedule::kBuffers].arrive_one(); ++chunk_;",
        r"DEADLOCK: .*scheduler waits for schedule_empty\[\d\] use 0 .* (127|254|381) of \d+"
        r" arrivals",
    ),
    "EveryNextChunkGivenBackInOneBuffer": (
        "schedule_.empty[chunk_++ % TileSchedule::kBuffers].arrive_all();",
        "schedule_.empty[0].arrive_all(); ++chunk_;",
        r"TOO MANY ARRIVALS on schedule_empty|DEADLOCK: .*scheduler waits for schedule_empty",
    ),
    "NextChunkTakenForTheEnd": (
        "step = past_chunk_end(step); while",
        "while",
        r"DEADLOCK|LOADS STILL IN FLIGHT|RACE",
    ),
    "NextChunkAfterPassesNotEntered": (
        "step = past_chunk_end(take());",
        "step = take();",
        r"DEADLOCK|LOADS STILL IN FLIGHT|RACE",
    ),
    "LastNextChunkNotGivenBack": (
        "void end_work_tile() { release_chunk(); }",
        "void end_work_tile() { ++chunk_; }",
        r"DEADLOCK: .*scheduler waits for schedule_empty",
    ),
    "LastNextChunkGivenBackTwice": (
        "void end_work_tile() { release_chunk(); }",
        "void end_work_tile() { release_chunk(); --chunk_; release_chunk(); }",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to|PHASE ALIAS",
    ),
    "NextChunkGivenBackBeforeItIsRead": (
        "step = past_chunk_end(step); while",
        "release_chunk(); --chunk_; step = past_chunk_end(step); while",
        r"TOO MANY ARRIVALS on schedule_empty|RACE: .*scheduler: store to|PHASE ALIAS",
    ),
    # skips
    "FirstPassedAlone": (
        "while (step.is(ConsumerStep::kSkip)) {",
        "if (step.is(ConsumerStep::kSkip)) {",
        WORK_LEFT,
    ),
    "PassedTakenForItsComputed": (
        "while (step.is(ConsumerStep::kSkip)) {",
        "while (false) {",
        WORK_LEFT,
    ),
    "PassedFirstNotAwaited": (
        "rings_.wait_first(step);",
        "",
        rf"TOO MANY ARRIVALS on first_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
    "PassedBothNotAwaited": (
        "rings_.wait_both(step);",
        "",
        rf"TOO MANY ARRIVALS on both_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
    "PassedFirstNotReleased": (
        "rings_.release_first(step);",
        "",
        r"DEADLOCK: .*producer\d waits for first_empty",
    ),
    "PassedSecondNotReleased": (
        "rings_.release_second(step);",
        "",
        r"DEADLOCK: .*producer\d waits for (both|second)_empty",
    ),
    "ComputedNotAwaited": (
        "if (step.is(ConsumerStep::kCompute)) wait(step);",
        "",
        rf"TOO MANY ARRIVALS|PHASE ALIAS|(RACE|NEVER WRITTEN): |{OVERWRITTEN}",
    ),
    "ComputedNotLookedFor": (
        "acquire_chunk(); return next_compute(take());",
        "acquire_chunk(); return take();",
        WORK_LEFT,
    ),
    # flushes
    "OneFlushAlone": (
        "while (step.is(ConsumerStep::kFlush)) step = next_compute(take());",
        "if (step.is(ConsumerStep::kFlush)) step = next_compute(take());",
        WORK_LEFT,
    ),
    "RunEndsTheWorkTile": (
        "while (step.is(ConsumerStep::kFlush)) step = next_compute(take());",
        "",
        WORK_LEFT,
    ),
    "PassedAfterAFlush": (
        "while (step.is(ConsumerStep::kFlush)) step = next_compute(take());",
        "while (step.is(ConsumerStep::kFlush)) step = take();",
        WORK_LEFT,
    ),
    "RunGoesOnPastFlushes": (
        "step = past_chunk_end(take()); } return step;",
        "step = past_chunk_end(take()); } return step.is(ConsumerStep::kFlush) ?"
        " next_compute(take()) : step;",
        PRODUCER_STUCK,
    ),
}

# Found in the pass over queries alone: in the pass over keys a consumer releases the second
# tile that it holds before the next one of the first ring, so no consumer skips a stage still held.
IN_SKIPS: MutantTable = {
    "PassedSecondNotAwaited": (
        "rings_.wait_second(step);",
        "",
        rf"TOO MANY ARRIVALS on second_empty|PHASE ALIAS|{OVERWRITTEN}",
    ),
}

# How each pass of the backward goes on, found where loads are skipped and flushed.
IN_RUNS: MutantTable = {
    "PassesNotLookedFor": (
        "next = there ? after : steps_.next_compute(after, wait);",
        "next = after; if (!there && next.is(ConsumerStep::kCompute)) wait(next);",
        WORK_LEFT,
    ),
    "PassesOfARunNotLookedFor": (
        "ConsumerStep next = steps_.next_compute(steps_.take(), wait);",
        "ConsumerStep next = steps_.take(); if (next.is(ConsumerStep::kCompute)) wait(next);",
        WORK_LEFT,
    ),
    "FlushesTakenForTheEnd": (
        "held = steps_.resume(next);",
        "held = next;",
        WORK_LEFT,
    ),
}
