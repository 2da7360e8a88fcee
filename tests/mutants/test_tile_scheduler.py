# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/schedule/tile_scheduler.h by itself: tile loads, consumer steps, and mutants."""

from __future__ import annotations

import re

import pytest
from mutants.bugs_in_order import IN_ORDER
from mutants.bugs_in_tile_schedule import IN_LOADS
from mutants.planted_bugs import ROOT, build, in_namespaces

PROGRAM = ROOT / "tests" / "cpp" / "tile_scheduler.cpp"
HEADERS = ("kernels/schedule/tile_schedule.h", "kernels/schedule/tile_scheduler.h")
BUGS = {"kernels/schedule/tile_schedule.h": IN_LOADS, "kernels/schedule/tile_scheduler.h": IN_ORDER}
SEEDS = 120  # every size of rows, words and loads, with every kind of selection


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    """Runs the scheduler of one bug; returns the first report."""
    folder = tmp_path_factory.mktemp("plan")
    each = " ".join(f"PLAN({name})" for bugs in BUGS.values() for name in bugs)
    copies = [in_namespaces(HEADERS, header, bugs) for header, bugs in BUGS.items()]
    bugs = folder / "bugs.h"
    bugs.write_text(
        "\n".join(
            [
                '#include "kernels/schedule/tile_scheduler.h"',
                *copies,
                f"#define VSA_EACH_BUG(PLAN) {each}\n",
            ]
        )
    )
    program = build(compiler, PROGRAM, folder / "bugs", "-Og", "-w", "-include", bugs)
    return lambda name: program(name, SEEDS)


def test_every_wanted_tile_comes_once_and_in_turn(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "plan", *flags)
    assert program("vsa", 10 * SEEDS) == "nothing"


@pytest.mark.parametrize("bug", [*IN_ORDER, *IN_LOADS])
def test_bug_is_reported_by_name(planted, bug):
    report = planted(bug)
    expected = {**IN_ORDER, **IN_LOADS}[bug][2]
    assert re.match(rf"seed \d+: ({expected})", report), report
