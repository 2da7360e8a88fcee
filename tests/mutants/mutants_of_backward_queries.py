# SPDX-License-Identifier: Apache-2.0
"""Mutants of the pass over query tiles, for test_backward_kernels.py.

They are written as in mutants_of_query_kernels.py.
"""

from __future__ import annotations

from mutants.mutant_programs import MutantTable
from mutants.mutants_of_query_kernels import ALIKE, ALIKE_IN_RUNS

IN_QUERIES: MutantTable = {
    **ALIKE,
    # Q and dO
    "BytesOfGradOutForgotten": (
        "full.arrive_expect_tx(2 * p_.queries.box_rows(at) * D * kElementBytes);",
        "full.arrive_expect_tx(p_.queries.box_rows(at) * D * kElementBytes);",
        r"WRONG EXPECT_TX: resident_full\[\d\] use \d expects fewer bytes|RACE: .*grad_out\[\d\]",
    ),
    # loads, and the barrier that they count on
    "LoadedIntoTheNextStage": (
        "s_.v[Rings::first_stage(number_++)]",
        "s_.v[Rings::first_stage(++number_)]",
        r"(NEVER WRITTEN|RACE): .*v\[\d+\]",
    ),
    "LoadedIntoTheStageOfTheOtherRing": (
        "s_.v[Rings::first_stage(number_++)]",
        "s_.v[Rings::second_stage(number_++) % Rings::kFirst]",
        r"(NEVER WRITTEN|RACE): .*v\[\d+\]|WRONG NUMBERS",
    ),
    "WrongTensor": (
        "p_.v, &KeySchedule::Origins::first,",
        "p_.k, &KeySchedule::Origins::first,",
        "WRONG NUMBERS",
    ),
    # stages released
    "FirstReleasedBeforeWait": (
        "wgmma_wait<1>(scores_, grad_scores_); release_first(next);",
        "release_first(next); wgmma_wait<1>(scores_, grad_scores_);",
        r"RACE: .*TMA load into v\[\d+\]",
    ),
    "FirstOfARunReleasedBeforeWait": (
        "wgmma_wait<0>(scores_, grad_scores_); release_first(step);",
        "release_first(step); wgmma_wait<0>(scores_, grad_scores_);",
        r"RACE: .*TMA load into v\[\d+\]",
    ),
    "SecondReleasedBeforeWait": (
        "wgmma_wait<0>(grad_q_); s_.rings.release_second(held); round_to",
        "s_.rings.release_second(held); wgmma_wait<0>(grad_q_); round_to",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "SecondReleasedBeforeGradient": (
        "issue_gradient(held); wgmma_wait<0>(grad_q_); s_.rings.release_second(held); held =",
        "s_.rings.release_second(held); issue_gradient(held); wgmma_wait<0>(grad_q_); held =",
        r"RACE: .*TMA load into (k|v)\[\d+\]",
    ),
    "NextReleasedInsteadOfHeld": (
        "s_.rings.release_second(held); round_to",
        "s_.rings.release_second(next); round_to",
        r"RACE: .*TMA load into (k|v)\[\d+\]|TOO MANY ARRIVALS|DEADLOCK|PHASE ALIAS",
    ),
    # loads waited for
    "FirstNotAwaited": (
        "s_.rings.wait_first(step);",
        "",
        r"(RACE|NEVER WRITTEN): .*v\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "SecondNotAwaited": (
        "s_.rings.wait_second(step);",
        "",
        r"(RACE|NEVER WRITTEN): .*k\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "TakenToBeThere": (
        "there = after.is(ConsumerStep::kCompute) && s_.rings.has_both(after);",
        "there = after.is(ConsumerStep::kCompute);",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    "TileBeforeSeen": (
        "s_.rings.has_both(after);",
        "s_.rings.has_both(next);",
        r"(RACE|NEVER WRITTEN): .*[kv]\[\d+\]|TOO MANY ARRIVALS|PHASE ALIAS",
    ),
    # products
    "ScoresNotAwaited": (
        "wgmma_wait<1>(scores_, grad_scores_);",
        "",
        "FRAGMENT IN FLIGHT: .*an accumulator",
    ),
    "FirstScoresWaitTooShallow": (
        "wgmma_wait<0>(scores_, grad_scores_);",
        "wgmma_wait<1>(scores_, grad_scores_);",
        "WGMMA STILL IN FLIGHT",
    ),
    "ProductsInWrongOrder": (
        "issue_scores(next); issue_gradient(held);",
        "issue_gradient(held); issue_scores(next);",
        "WGMMA STILL IN FLIGHT",
    ),
    "GradQWaitTooShallow": (
        "wgmma_wait<0>(grad_q_); s_.rings.release_second(held); held",
        "wgmma_wait<1>(grad_q_); s_.rings.release_second(held); held",
        "WGMMA STILL IN FLIGHT",
    ),
    "RoundedOverwritten": (
        "wgmma_wait<0>(grad_q_); s_.rings.release_second(held);"
        " round_to<Element>(rounded_, grad_scores_);",
        "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_q_);"
        " s_.rings.release_second(held);",
        "FRAGMENT IN FLIGHT: .*an operand",
    ),
    # the gradient leaves
    "GradientNotFenced": (
        "fence_async_proxy(); named_sync(",
        "named_sync(",
        r"MISSING PROXY FENCE .*TMA store from q\[\d\]",
    ),
    # nothing but the numbers tells
    "RowsNotMasked": (
        "mask_columns(scores_, step.rows);",
        "",
        "WRONG NUMBERS in dq",
    ),
    "RowsOfTheTileHeld": (
        "issue_gradient(held); ConsumerStep after = steps_.take(); wgmma_wait<1>(scores_,"
        " grad_scores_);"
        " release_first(next); differentiate(next);",
        "issue_gradient(held); ConsumerStep after = steps_.take(); wgmma_wait<1>(scores_,"
        " grad_scores_);"
        " release_first(next); differentiate(held);",
        "WRONG NUMBERS in dq",
    ),
    # rows of a tile that no load brings
    "TailOfGradOutNotZeroed": (
        "zero_tail(s.grad_out[w], p.queries.grid.tile.volume(), thread, threads);",
        "",
        r"NEVER WRITTEN: .* grad_out\[\d+\]",
    ),
}

# Found where loads are skipped and flushed.
IN_RUNS_OF_QUERIES: MutantTable = {
    **ALIKE_IN_RUNS,
}
