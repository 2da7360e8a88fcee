# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/schedule/tile_scheduler.h by itself: tile loads, consumer steps, and mutants."""

from __future__ import annotations

import pytest
from mutants.bugs_in_order import IN_ORDER
from mutants.bugs_in_tile_schedule import IN_LOADS
from mutants.planted_bugs import ROOT, build, is_named, mutants, write

PROGRAM = ROOT / "tests" / "cpp" / "tile_scheduler.cpp"
HEADERS = ("kernels/schedule/tile_schedule.h", "kernels/schedule/tile_scheduler.h")
BUGS = {"kernels/schedule/tile_schedule.h": IN_LOADS, "kernels/schedule/tile_scheduler.h": IN_ORDER}
SEEDS = 120  # every size of rows, words and loads, with every kind of selection


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    """Runs the scheduler of one bug; returns the first report."""
    folder = tmp_path_factory.mktemp("schedule")
    found = [mutants(HEADERS, header, bugs) for header, bugs in BUGS.items()]
    of_bug = {name: each for each, bugs in zip(found, BUGS.values(), strict=True) for name in bugs}
    code = "\n".join(
        ['#include "kernels/schedule/tile_scheduler.h"', *(each.code for each in found)]
    )
    places = [(each.namespace(name), "schedule") for name, each in of_bug.items()]
    copies = write(folder / "bugs.h", code, ["schedule"], places)
    program = build(compiler, PROGRAM, folder / "bugs", "-Og", "-w", "-include", copies)
    for each in found:
        assert program(each.common, SEEDS, 0) == "nothing"  # none of its bugs is chosen
    return lambda name: program(*of_bug[name].words(name, SEEDS))


def test_every_wanted_tile_comes_once_and_in_turn(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "schedule", *flags)
    assert program("vsa", 10 * SEEDS) == "nothing"


@pytest.mark.parametrize("bug", [*IN_ORDER, *IN_LOADS])
def test_bug_is_reported_by_name(planted, bug):
    report = planted(bug)
    assert is_named(report, {**IN_ORDER, **IN_LOADS}[bug]), report
