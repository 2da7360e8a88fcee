# SPDX-License-Identifier: Apache-2.0
"""The forward kernel as mutants: the emulator reports each by its name."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted
from mutants.mutants_of_forward import IN_FORWARD, IN_GATED_FORWARD, IN_RUNS_OF_FORWARD

PROGRAM = ROOT / "tests" / "cpp" / "fine_forward.cpp"
HEADER = "kernels/fine/forward.h"
PROBLEMS = ("forward", "uneven", "gated")
SEEDS = 18  # the nine schedules of test_emulator.py, with rings of two kinds
MUTANTS = {
    ("forward",): IN_FORWARD,
    ("uneven",): IN_RUNS_OF_FORWARD,
    ("gated",): IN_GATED_FORWARD,
}


NO_MUTANT: MutantTable = {"Same": ("fill(out_, 0.f);", "fill(out_, 0.f);", "")}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forward")
    tables = {HEADER: {**MUTANTS, ("forward",): {**IN_FORWARD, **NO_MUTANT}}}
    includes = "launch/fine_params.h"
    return Planted(compiler, PROGRAM, folder, (HEADER,), tables, PROBLEMS, SEEDS, includes)


def test_mutants_are_reported_by_name(planted):
    assert planted.unnoticed(HEADER).keys() == {("Same", "forward")}


def test_a_change_that_is_no_mutant_is_not_reported(planted):
    assert planted.report(HEADER, "Same", "forward") == "nothing"


def test_an_unchanged_kernel_is_not_reported(planted):
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
