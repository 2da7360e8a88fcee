# SPDX-License-Identifier: Apache-2.0
"""Programs of tests/cpp with mutants of kernel headers, and what these are reported as.

Nearly all mutants of a header are one copy of it, in which a number chooses one while the program
runs (schema.py). The others are copies of their own. Each copy is in a namespace of its own. A
program says `VSA_EACH_MUTANT(...)` where it wants all of them, and finds the names of the
namespaces, each as the argument of a macro of its own, e.g. `KEYS(in_rings) QUERIES(in_rings)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from child_process import output
from mutants.schema import schema, without_comments

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "tests" / "cpp"
CSRC = ROOT / "csrc"

# By name: the text that a header has once, what becomes of it, how that must be reported.
MutantTable = Mapping[str, tuple[str, str, str]]


def build(compiler: object, source: Path, program: Path, *flags: object) -> Callable[..., str]:
    """Compiles a program of tests/cpp; returns a function that runs it with words."""
    output(compiler, "-std=c++20", f"-I{CSRC}", f"-I{CPP}", *flags, source, "-o", program)
    return lambda *words: output(program, *words)


def text_of(header: str) -> str:
    """A header without its comments and what it includes."""
    code = without_comments((CSRC / header).read_text())
    return re.sub(r"^#(pragma once|include .*)$", "", code, flags=re.MULTILINE)


def place(header: str, name: str, mutant: tuple[str, str, str]) -> tuple[int, int]:
    """Where the text begins and ends that a mutant changes, in `text_of(header)`."""
    pattern = r"\s+".join(re.escape(word) for word in mutant[0].split())
    found = list(re.finditer(pattern, text_of(header)))
    assert len(found) == 1, f"{name}: {header} has this {len(found)} times, not once: {mutant[0]}"
    return found[0].span()


def in_namespace(name: str, headers: Sequence[str], changed: Mapping[str, str]) -> str:
    """Copies of headers in a namespace. changed: the texts of those that differ"""
    code = "\n".join(changed.get(header) or text_of(header) for header in headers)
    # A name that a class shadows is qualified: it means the copy's.
    code = code.replace("vsa::", f"vsa::{name}::")
    return code.replace("namespace vsa {", f"namespace vsa::{name} {{")


@dataclass(frozen=True)
class Mutants:
    """A header with its mutants: the code of all copies, and how a program is asked for each."""

    code: str
    common: str
    """The namespace of the copy in which a number chooses."""
    chosen: Mapping[str, int]
    """The mutants that are in it, by their numbers."""

    def namespace(self, name: str) -> str:
        return self.common if name in self.chosen else name

    def words(self, name: str, *words: object) -> tuple[object, ...]:
        """What a program is called with, if `words` are what follows the namespace."""
        return (self.namespace(name), *words, self.chosen.get(name, 0))


def in_copies(headers: Sequence[str], header: str, mutants: MutantTable) -> Mutants:
    """Copies of all headers for the mutants that one of them has."""
    text, common = text_of(header), f"in_{Path(header).stem}"
    spans = {name: place(header, name, mutant) for name, mutant in mutants.items()}
    numbers = {name: number for number, name in enumerate(mutants, start=1)}
    changes = {numbers[name]: (*span, mutants[name][1]) for name, span in spans.items()}
    together, taken = schema(text, changes)
    chosen = {name: number for name, number in numbers.items() if number in taken}
    copies = [in_namespace(common, headers, {header: together})]
    for name, (begin, end) in spans.items():
        if name not in chosen:
            alone = text[:begin] + mutants[name][1] + text[end:]
            copies.append(in_namespace(name, headers, {header: alone}))
    code = "\n".join(copies).replace("VSA_MUTANT", "::vsa::test::mutant")
    return Mutants(code, common, chosen)


def write(
    path: Path, code: str, problems: Sequence[str], places: Sequence[tuple[str, str]]
) -> Path:
    """What is included before a program.

    Args:
        path: of the file that is written.
        code: of the copies and what they include.
        problems: all that the program knows, in the order of ``VSA_EACH_MUTANT``'s arguments.
        places: the namespaces, each with a problem that it is wanted in.
    """
    each = " ".join(f"{problem.upper()}({space})" for space, problem in dict.fromkeys(places))
    path.write_text(
        f'#include "reports.h"\n{code}\n'
        f"#define VSA_EACH_MUTANT({', '.join(problems).upper()}) {each}\n"
    )
    return path


def is_named(report: str, mutant: tuple[str, str, str]) -> bool:
    """Whether a program reports a mutant as it must."""
    return re.match(rf"seed \d+: ({mutant[2]})", report) is not None


def unnoticed(
    compiler: object,
    source: Path,
    folder: Path,
    headers: Sequence[str],
    header: str,
    tables: Mapping[Sequence[str], MutantTable],
    problems: Sequence[str],
    seeds: int,
    includes: str = "launch/fine_params.h",
) -> dict[tuple[str, str], str]:
    """What a program reports where that is not what a mutant must be reported as.

    Args:
        compiler: of C++.
        source: a program of tests/cpp.
        folder: for the program.
        headers: that every mutant gets copies of.
        header: of them, which has the mutants.
        tables: mutants by the problems that each of them is found in.
        problems: all that the program knows, in the order of ``VSA_EACH_MUTANT``'s arguments.
        seeds: schedules to try.
        includes: a header that includes all that the copies are built upon.
    """
    mutants = {name: mutant for table in tables.values() for name, mutant in table.items()}
    found = in_copies(headers, header, mutants)
    asked = [(name, at) for found_in, table in tables.items() for name in table for at in found_in]
    places = [(found.namespace(name), at) for name, at in asked]
    code = f'#include "{includes}"\n{found.code}'
    copies = write(folder / "mutants.h", code, problems, places)
    program = build(compiler, source, folder / "mutants", "-Og", "-w", "-include", copies)
    for space, at in dict.fromkeys(places):
        if space == found.common:
            assert program(space, at, seeds, 0) == "nothing"  # none of its mutants is chosen
    reports = {(name, at): program(*found.words(name, at, seeds)) for name, at in asked}
    return {
        (name, at): report
        for (name, at), report in reports.items()
        if not is_named(report, mutants[name])
    }
