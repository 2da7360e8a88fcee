# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/schedule/tile_scheduler.h by itself: tile loads, consumer steps, and mutants."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, Planted, is_named
from mutants.mutants_of_schedule_order import IN_ORDER
from mutants.mutants_of_tile_schedule import IN_LOADS

PROGRAM = ROOT / "tests" / "cpp" / "tile_scheduler.cpp"
MUTANTS = {
    "kernels/schedule/tile_schedule.h": IN_LOADS,
    "kernels/schedule/tile_scheduler.h": IN_ORDER,
}
SEEDS = 120  # every size of rows, words and loads, with every kind of selection


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    tables = {header: {("schedule",): mutants} for header, mutants in MUTANTS.items()}
    includes = "kernels/schedule/tile_scheduler.h"
    return Planted(
        compiler, PROGRAM, folder, tuple(MUTANTS), tables, ("schedule",), SEEDS, includes
    )


def test_every_wanted_tile_comes_once_and_in_turn(planted):
    assert planted.unchanged("schedule", 4 * SEEDS) == "nothing"


@pytest.mark.parametrize("mutant", [*IN_ORDER, *IN_LOADS])
def test_mutant_is_reported_by_name(planted, mutant):
    header = next(header for header, mutants in MUTANTS.items() if mutant in mutants)
    report = planted.report(header, mutant, "schedule")
    assert is_named(report, MUTANTS[header][mutant]), report
