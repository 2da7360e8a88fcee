# SPDX-License-Identifier: Apache-2.0
"""The backward's own kernels as mutants: the emulator reports each by its name."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, Planted, place
from mutants.mutants_of_backward_keys import IN_KEYS
from mutants.mutants_of_backward_queries import IN_QUERIES, IN_RUNS_OF_QUERIES
from mutants.mutants_of_consumer_steps import IN_CONSUMER_STEPS, IN_RUNS, IN_SKIPS
from mutants.mutants_of_query_sums import IN_KEYS_WITH_A_REDUCER, IN_OWNERS, IN_QUERY_SUMS
from mutants.mutants_of_resident_tiles import IN_RESIDENT_TILES
from mutants.mutants_of_rings import IN_RINGS
from mutants.mutants_of_tile_schedule import IN_SCHEDULE
from mutants.mutants_of_tile_scheduler import IN_HEADS, IN_SCHEDULER

PROGRAM = ROOT / "tests" / "cpp" / "fine_backward.cpp"
SEEDS = 18  # the nine schedules of test_emulator.py, with rings of two kinds

HEADERS = (
    "kernels/schedule/tile_schedule.h",
    "kernels/schedule/resident_tiles.h",
    "kernels/schedule/tile_scheduler.h",
    "kernels/schedule/rings.h",
    "kernels/fine/query_sums.h",
    "kernels/fine/backward_keys.h",
    "kernels/fine/backward_queries.h",
)

# By header: its mutants, and the problems that each is found in.
UNEVEN = ("uneven_keys", "uneven_queries")
ONE_PASS = ("one_pass", "uneven_one_pass")
PROBLEMS = ("keys", "queries", "one_pass", *UNEVEN, "uneven_one_pass")
MUTANTS = {
    "kernels/fine/query_sums.h": {ONE_PASS: IN_QUERY_SUMS},
    "kernels/fine/backward_keys.h": {
        ("keys",): IN_KEYS,
        ("uneven_keys",): IN_RUNS,
        ONE_PASS: IN_KEYS_WITH_A_REDUCER,
    },
    "kernels/fine/backward_queries.h": {
        ("queries",): IN_QUERIES,
        ("uneven_queries",): {**IN_RUNS, **IN_RUNS_OF_QUERIES},
    },
    "kernels/schedule/resident_tiles.h": {("keys", "queries"): IN_RESIDENT_TILES},
    "kernels/schedule/tile_schedule.h": {UNEVEN: IN_SCHEDULE},
    "kernels/schedule/tile_scheduler.h": {
        UNEVEN: IN_SCHEDULER,
        ("uneven_keys",): IN_HEADS,
        ONE_PASS: IN_OWNERS,
    },
    "kernels/schedule/rings.h": {
        UNEVEN: {**IN_RINGS, **IN_CONSUMER_STEPS},
        ("uneven_queries",): IN_SKIPS,
    },
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backward")
    includes = "launch/fine_params.h"
    return Planted(compiler, PROGRAM, folder, HEADERS, MUTANTS, PROBLEMS, SEEDS, includes)


@pytest.mark.parametrize("header", MUTANTS)
def test_mutants_are_reported_by_name(planted, header):
    assert not planted.unnoticed(header)


def test_unchanged_kernels_are_not_reported(planted):
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"


def test_text_that_a_header_does_not_have_once_is_no_substitution():
    for name, text in {"Rotten": "wait_full(n);", "Ambiguous": "VSA_DEVICE void"}.items():
        with pytest.raises(
            AssertionError, match=f"{name}: kernels/schedule/rings.h has this .* not once"
        ):
            place("kernels/schedule/rings.h", name, (text, "", ""))
