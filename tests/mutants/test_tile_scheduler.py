# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/schedule/tile_scheduler.h by itself: tile loads, consumer steps, and mutants."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, build, in_copies, is_named, write
from mutants.mutants_of_schedule_order import IN_ORDER
from mutants.mutants_of_tile_schedule import IN_LOADS

PROGRAM = ROOT / "tests" / "cpp" / "tile_scheduler.cpp"
HEADERS = ("kernels/schedule/tile_schedule.h", "kernels/schedule/tile_scheduler.h")
MUTANTS = {
    "kernels/schedule/tile_schedule.h": IN_LOADS,
    "kernels/schedule/tile_scheduler.h": IN_ORDER,
}
SEEDS = 120  # every size of rows, words and loads, with every kind of selection


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    """Runs the scheduler of one mutant; returns the first report."""
    folder = tmp_path_factory.mktemp("schedule")
    found = [in_copies(HEADERS, header, mutants) for header, mutants in MUTANTS.items()]
    of_mutant = {
        name: each
        for each, mutants in zip(found, MUTANTS.values(), strict=True)
        for name in mutants
    }
    code = "\n".join(
        ['#include "kernels/schedule/tile_scheduler.h"', *(each.code for each in found)]
    )
    places = [(each.namespace(name), "schedule") for name, each in of_mutant.items()]
    copies = write(folder / "mutants.h", code, ["schedule"], places)
    program = build(compiler, PROGRAM, folder / "mutants", "-Og", "-w", "-include", copies)
    for each in found:
        assert program(each.common, SEEDS, 0) == "nothing"  # none of its mutants is chosen
    return lambda name: program(*of_mutant[name].words(name, SEEDS))


def test_every_wanted_tile_comes_once_and_in_turn(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "schedule", *flags)
    assert program("vsa", 10 * SEEDS) == "nothing"


@pytest.mark.parametrize("mutant", [*IN_ORDER, *IN_LOADS])
def test_mutant_is_reported_by_name(planted, mutant):
    report = planted(mutant)
    assert is_named(report, {**IN_ORDER, **IN_LOADS}[mutant]), report
