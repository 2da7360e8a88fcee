# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/plan.h by itself: which tiles come, in which order, and bugs by their names."""

from __future__ import annotations

import re

import pytest
from bugs_in_plan import IN_ORDER
from planted_bugs import ROOT, build, in_namespaces

PROGRAM = ROOT / "tests" / "cpp" / "plan.cpp"
HEADER = "kernels/plan.h"
SEEDS = 120  # every size of rows, words and steps, with every kind of selection


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    """Runs the planner of one bug; returns the first report."""
    folder = tmp_path_factory.mktemp("plan")
    each = " ".join(f"PLAN({name})" for name in IN_ORDER)
    copies = folder / "bugs.h"
    copies.write_text(
        f'#include "{HEADER}"\n'
        f"{in_namespaces([HEADER], HEADER, IN_ORDER)}\n"
        f"#define VSA_EACH_BUG(PLAN) {each}\n"
    )
    program = build(compiler, PROGRAM, folder / "bugs", "-Og", "-w", "-include", copies)
    return lambda name: program(name, SEEDS)


def test_every_wanted_tile_comes_once_and_in_turn(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "plan", *flags)
    assert program("vsa", 10 * SEEDS) == "nothing"


@pytest.mark.parametrize("bug", IN_ORDER)
def test_bug_is_reported_by_name(planted, bug):
    report = planted(bug)
    assert re.match(rf"seed \d+: ({IN_ORDER[bug][2]})", report), report
