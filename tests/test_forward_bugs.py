# SPDX-License-Identifier: Apache-2.0
"""The forward kernel with bugs put into it: the emulator finds each one by its name."""

from __future__ import annotations

import re

from bugs_in_forward import IN_FORWARD, IN_RUNS_OF_FORWARD
from planted_bugs import ROOT, build, in_namespaces

PROGRAM = ROOT / "tests" / "cpp" / "fine_forward.cpp"
HEADER = "kernels/fine_forward.h"
SEEDS = 18  # the nine schedules of test_emulator.py, with rings of two kinds


def test_bugs_are_reported_by_name(compiler, tmp_path):
    bugs = {**IN_FORWARD, **IN_RUNS_OF_FORWARD}
    each = [f"FORWARD({name})" for name in IN_FORWARD]
    each += [f"UNEVEN({name})" for name in IN_RUNS_OF_FORWARD]
    copies = tmp_path / "bugs.h"
    copies.write_text(
        '#include "launch/fine_params.h"\n'
        f"{in_namespaces((HEADER,), HEADER, bugs)}\n"
        f"#define VSA_EACH_BUG(FORWARD, UNEVEN) {' '.join(each)}\n"
    )
    program = build(compiler, PROGRAM, tmp_path / "bugs", "-Og", "-w", "-include", copies)
    reports = {
        name: program(name, "forward" if name in IN_FORWARD else "uneven", SEEDS) for name in bugs
    }
    missed = {
        name: report
        for name, report in reports.items()
        if not re.match(rf"seed \d+: ({bugs[name][2]})", report)
    }
    assert not missed


def test_a_kernel_without_a_bug_is_not_reported(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "kernel", *flags)
    for lists in ("forward", "uneven"):
        assert program("vsa", lists, 5 * SEEDS) == "nothing"
