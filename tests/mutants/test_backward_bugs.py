# SPDX-License-Identifier: Apache-2.0
"""The backward's own kernels with bugs put into them: the emulator finds each one by its name."""

from __future__ import annotations

import pytest
from mutants.bugs_in_keys import IN_KEYS
from mutants.bugs_in_own_tiles import IN_OWN_TILES
from mutants.bugs_in_plan import IN_PLAN
from mutants.bugs_in_planner import IN_HEADS, IN_PLANNER
from mutants.bugs_in_queries import IN_QUERIES, IN_RUNS_OF_QUERIES
from mutants.bugs_in_rings import IN_RINGS
from mutants.bugs_in_stops import IN_PASSES, IN_RUNS, IN_STOPS
from mutants.planted_bugs import ROOT, build, place, unnoticed

PROGRAM = ROOT / "tests" / "cpp" / "fine_backward.cpp"
SEEDS = 18  # the nine schedules of test_emulator.py, with rings of two kinds

BOTH_PASSES = ("kernels/fine_backward_keys.h", "kernels/fine_backward_queries.h")
ALL = (
    "kernels/plan.h",
    "kernels/own_tiles.h",
    "kernels/planner.h",
    "kernels/slots.h",
    *BOTH_PASSES,
)
# A bug has a namespace of its own, with copies of its header and of all that is built upon it.
COPIED = {
    "kernels/fine_backward_keys.h": ("kernels/fine_backward_keys.h",),
    "kernels/fine_backward_queries.h": ("kernels/fine_backward_queries.h",),
    "kernels/own_tiles.h": ("kernels/own_tiles.h", *BOTH_PASSES),
    "kernels/plan.h": ALL,
    "kernels/planner.h": ALL,
    "kernels/slots.h": ALL,
}

# By header: its bugs, and the problems that each is found in.
UNEVEN = ("uneven_keys", "uneven_queries")
PROBLEMS = ("keys", "queries", *UNEVEN)
BUGS = {
    "kernels/fine_backward_keys.h": {("keys",): IN_KEYS, ("uneven_keys",): IN_RUNS},
    "kernels/fine_backward_queries.h": {
        ("queries",): IN_QUERIES,
        ("uneven_queries",): {**IN_RUNS, **IN_RUNS_OF_QUERIES},
    },
    "kernels/own_tiles.h": {("keys", "queries"): IN_OWN_TILES},
    "kernels/plan.h": {UNEVEN: IN_PLAN},
    "kernels/planner.h": {UNEVEN: IN_PLANNER, ("uneven_keys",): IN_HEADS},
    "kernels/slots.h": {UNEVEN: {**IN_RINGS, **IN_STOPS}, ("uneven_queries",): IN_PASSES},
}


@pytest.mark.parametrize("header", BUGS)
def test_bugs_are_reported_by_name(compiler, tmp_path, header):
    copied, tables = COPIED[header], BUGS[header]
    assert not unnoticed(compiler, PROGRAM, tmp_path, copied, header, tables, PROBLEMS, SEEDS)


def test_kernels_without_a_bug_are_not_reported(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "kernels", *flags)
    for name in PROBLEMS:
        assert program("vsa", name, 5 * SEEDS) == "nothing"


def test_text_that_a_header_does_not_have_once_is_no_substitution():
    for name, text in {"Rotten": "wait_full(n);", "Ambiguous": "VSA_DEVICE void"}.items():
        with pytest.raises(AssertionError, match=f"{name}: kernels/slots.h has this .* not once"):
            place("kernels/slots.h", name, (text, "", ""))
