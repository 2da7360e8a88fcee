# SPDX-License-Identifier: Apache-2.0
"""Copies of kernel headers with bugs put into them, each in a namespace of its own.

A program of tests/cpp says `VSA_EACH_BUG(...)` where it wants all of them, and finds the names of
the namespaces, each as the argument of a macro of its own, e.g. `KEYS(NoWait) QUERIES(NoWait)`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# By name: the text that a header has once, what becomes of it, how that must be reported.
Bugs = Mapping[str, tuple[str, str, str]]


def run(*command: object) -> str:
    """What a command prints; fails unless it succeeds."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def build(compiler: object, source: Path, program: Path, *flags: object) -> Callable[..., str]:
    """Compiles a program of tests/cpp; returns a function that runs it with words."""
    run(compiler, "-std=c++20", f"-I{CSRC}", *flags, source, "-o", program)
    return lambda *words: run(program, *words)


def substitute(header: str, name: str, bug: tuple[str, str, str]) -> str:
    """The text of a header with a bug in it."""
    old, new, _ = bug
    pattern = r"\s+".join(re.escape(word) for word in old.split())
    text, count = re.subn(pattern, lambda _: new, (CSRC / header).read_text())
    assert count == 1, f"{name}: {header} has this {count} times, not once: {old}"
    return text


def in_namespaces(headers: Sequence[str], header: str, bugs: Bugs) -> str:
    """All headers once for each bug that one of them has, in a namespace that is called like it."""
    copies = []
    for name, bug in bugs.items():
        texts = [
            substitute(h, name, bug) if h == header else (CSRC / h).read_text() for h in headers
        ]
        code = re.sub(r"^#(pragma once|include .*)$", "", "\n".join(texts), flags=re.MULTILINE)
        # A name that a class shadows is qualified: it means the copy's.
        code = code.replace("vsa::", f"vsa::{name}::")
        copies.append(code.replace("namespace vsa {", f"namespace vsa::{name} {{"))
    return "\n".join(copies)


def unnoticed(
    compiler: object,
    source: Path,
    folder: Path,
    headers: Sequence[str],
    header: str,
    tables: Mapping[Sequence[str], Bugs],
    problems: Sequence[str],
    seeds: int,
) -> dict[tuple[str, str], str]:
    """What a program reports where that is not what a bug must be reported as.

    Args:
        compiler: of C++.
        source: a program of tests/cpp.
        folder: for the program.
        headers: that every bug gets copies of.
        header: of them, which has the bugs.
        tables: bugs by the problems that each of them is found in.
        problems: all that the program knows, in the order of ``VSA_EACH_BUG``'s arguments.
        seeds: schedules to try.
    """
    bugs = {name: bug for table in tables.values() for name, bug in table.items()}
    places = [(name, at) for found_in, table in tables.items() for name in table for at in found_in]
    copies = folder / "bugs.h"
    copies.write_text(
        '#include "launch/fine_params.h"\n'
        f"{in_namespaces(headers, header, bugs)}\n"
        f"#define VSA_EACH_BUG({', '.join(problems).upper()}) "
        f"{' '.join(f'{at.upper()}({name})' for name, at in places)}\n"
    )
    program = build(compiler, source, folder / "bugs", "-Og", "-w", "-include", copies)
    reports = {(name, at): program(name, at, seeds) for name, at in places}
    return {
        (name, at): report
        for (name, at), report in reports.items()
        if not re.match(rf"seed \d+: ({bugs[name][2]})", report)
    }
