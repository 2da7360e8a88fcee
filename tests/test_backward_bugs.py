# SPDX-License-Identifier: Apache-2.0
"""The backward's own kernels with bugs put into them: the emulator finds each one by its name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from bugs_in_keys import IN_KEYS
from bugs_in_queries import IN_QUERIES, IN_RING, IN_SLOTS

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "cpp" / "fine_backward.cpp"
SEEDS = 18  # the nine schedules of test_emulator.py, with many stages and with few

# What a pass is made of. A bug has a namespace of its own, with copies of all of these.
HEADERS = (
    "tile/ring.h",
    "kernels/slots.h",
    "kernels/fine_backward_keys.h",
    "kernels/fine_backward_queries.h",
)
PASSES = {
    "kernels/fine_backward_keys.h": ("Keys",),
    "kernels/fine_backward_queries.h": ("Queries",),
}  # the others are found in both

BUGS = {
    "kernels/fine_backward_keys.h": IN_KEYS,
    "kernels/fine_backward_queries.h": IN_QUERIES,
    "kernels/slots.h": IN_SLOTS,
    "tile/ring.h": IN_RING,
}


def run(*command):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def build(compiler, program, *flags):
    run(compiler, "-std=c++20", f"-I{CSRC}", *flags, PROGRAM, "-o", program)
    return lambda *words: run(program, *words)


def substitute(header, bug):
    """The text of a header with a bug in it."""
    old, new, _ = BUGS[header][bug]
    pattern = r"\s+".join(re.escape(word) for word in old.split())
    text, count = re.subn(pattern, lambda _: new, (CSRC / header).read_text())
    assert count == 1, f"{bug}: {header} has this {count} times, not once: {old}"
    return text


def in_namespace(header, bug):
    """All headers, in a namespace that is called like the bug that one of them has."""
    texts = [substitute(h, bug) if h == header else (CSRC / h).read_text() for h in HEADERS]
    code = re.sub(r"^#(pragma once|include .*)$", "", "\n".join(texts), flags=re.MULTILINE)
    return code.replace("namespace vsa {", f"namespace vsa::{bug} {{")


@pytest.mark.parametrize("header", BUGS)
def test_bugs_are_reported_by_name(compiler, tmp_path, header):
    passes = PASSES.get(header, ("Keys", "Queries"))
    copies = [in_namespace(header, bug) for bug in BUGS[header]]
    each = " ".join(f"{name.upper()}({bug})" for bug in BUGS[header] for name in passes)
    bugs = tmp_path / "bugs.h"
    bugs.write_text(
        "\n".join(
            [
                '#include "launch/fine_params.h"',
                *copies,
                f"#define VSA_EACH_BUG(KEYS, QUERIES) {each}",
            ]
        )
    )
    program = build(compiler, tmp_path / "bugs", "-Og", "-w", "-include", bugs)
    reports = {(bug, name): program(bug, name, SEEDS) for bug in BUGS[header] for name in passes}
    missed = {
        (bug, name): report
        for (bug, name), report in reports.items()
        if not re.match(rf"seed \d+: ({BUGS[header][bug][2]})", report)
    }
    assert not missed


def test_kernels_without_a_bug_are_not_reported(compiler, tmp_path):
    program = build(compiler, tmp_path / "kernels", "-O1", "-Wall", "-Wextra", "-Werror")
    for name in ("Keys", "Queries"):
        assert program("vsa", name, 5 * SEEDS) == "nothing"


def test_text_that_a_header_does_not_have_once_is_no_substitution(monkeypatch):
    monkeypatch.setitem(BUGS["tile/ring.h"], "Rotten", ("wait_full(n);", "", ""))
    monkeypatch.setitem(BUGS["tile/ring.h"], "Ambiguous", ("VSA_DEVICE void", "", ""))
    for bug in ("Rotten", "Ambiguous"):
        with pytest.raises(AssertionError, match=f"{bug}: tile/ring.h has this .* not once"):
            substitute("tile/ring.h", bug)
