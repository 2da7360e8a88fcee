# SPDX-License-Identifier: Apache-2.0
"""Programs of tests/cpp with mutants of kernel headers, and what these are reported as.

Nearly all mutants of a program are one copy of its headers, in which a number chooses one while it
runs (schema.py). The others are copies of their own. Each copy is in a namespace of its own. A
program says `VSA_EACH_MUTANT(...)` where it wants all of them, and finds the names of the
namespaces, each as the argument of a macro of its own, e.g. `KEYS(mutants) QUERIES(mutants)`.
Compiling takes longer than running, so the tests of a module share one program.
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


def build(compiler: object, source: Path, copies: Path, program: Path) -> Callable[..., str]:
    """Compiles a program of tests/cpp with what is included before it; returns what runs it."""
    flags = ["-std=c++20", "-Og", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{CPP}"]
    output(compiler, *flags, "-include", copies, source, "-o", program)
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
    """Headers with their mutants: the code of all copies, and how a program is asked for each."""

    code: str
    common: str
    """The namespace of the copy in which a number chooses."""
    numbers: Mapping[tuple[str, str], int]
    """By header and name. A mutant in a copy of its own is chosen by no number, 0."""

    def namespace(self, header: str, name: str) -> str:
        number = self.numbers[header, name]
        return self.common if number else f"{Path(header).stem}_{name}"

    def words(self, header: str, name: str, *words: object) -> tuple[object, ...]:
        """What a program is called with, if `words` are what follows the namespace."""
        return (self.namespace(header, name), *words, self.numbers[header, name])


def in_copies(headers: Sequence[str], mutants: Mapping[str, MutantTable]) -> Mutants:
    """Copies of headers for the mutants that some of them have.

    Args:
        headers: in the order in which one is built upon another.
        mutants: by header.
    """
    copies, changed, numbers = [], {}, {}
    for header, table in mutants.items():
        text = text_of(header)
        first = len(numbers) + 1
        spans = {name: place(header, name, mutant) for name, mutant in table.items()}
        changes = {
            number: (*spans[name], table[name][1]) for number, name in enumerate(table, first)
        }
        changed[header], taken = schema(text, changes)
        for number, name in enumerate(table, first):
            numbers[header, name] = number if number in taken else 0
            if number not in taken:
                begin, end = spans[name]
                alone = text[:begin] + table[name][1] + text[end:]
                built_upon = headers[headers.index(header) :]
                space = f"{Path(header).stem}_{name}"
                copies.append(in_namespace(space, built_upon, {header: alone}))
    common = "mutants"
    copies.insert(0, in_namespace(common, headers, changed))
    code = "\n".join(copies).replace("VSA_MUTANT", "::vsa::test::mutant")
    return Mutants(code, common, numbers)


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
        # A mutant may well have a variable that nothing uses: warnings are for the program alone.
        f'#pragma GCC system_header\n#include "reports.h"\n{code}\n'
        f"#define VSA_EACH_MUTANT({', '.join(problems).upper()}) {each}\n"
    )
    return path


def is_named(report: str, mutant: tuple[str, str, str]) -> bool:
    """Whether a program reports a mutant as it must."""
    return re.match(rf"seed \d+: ({mutant[2]})", report) is not None


class Planted:
    """A program of tests/cpp with all mutants of the headers that it is built upon.

    Args:
        compiler: of C++.
        source: a program of tests/cpp.
        folder: for the program.
        headers: that mutants get copies of, in the order in which one is built upon another.
        tables: by header: its mutants, by the problems that each of them is found in.
        problems: all that the program knows, in the order of ``VSA_EACH_MUTANT``'s arguments.
        seeds: schedules to try.
        includes: headers that include all that the copies are built upon.
    """

    def __init__(
        self,
        compiler: object,
        source: Path,
        folder: Path,
        headers: Sequence[str],
        tables: Mapping[str, Mapping[Sequence[str], MutantTable]],
        problems: Sequence[str],
        seeds: int,
        *includes: str,
    ) -> None:
        self._tables, self._seeds = tables, seeds
        self._mutants = {
            header: {name: mutant for table in of_header.values() for name, mutant in table.items()}
            for header, of_header in tables.items()
        }
        self._found = in_copies(headers, self._mutants)
        places = [(self._found.common, problem) for problem in problems]
        places += [
            (self._found.namespace(header, name), at)
            for header in tables
            for name, at in self._asked(header)
        ]
        code = "".join(f'#include "{name}"\n' for name in includes) + self._found.code
        copies = write(folder / "mutants.h", code, problems, places)
        self._program = build(compiler, source, copies, folder / "mutants")

    def _asked(self, header: str) -> list[tuple[str, str]]:
        of_header = self._tables[header].items()
        return [(name, at) for found_in, table in of_header for name in table for at in found_in]

    def unchanged(self, problem: str, seeds: int) -> str:
        """What the program says of the kernels where none of their mutants is chosen."""
        return self._program(self._found.common, problem, seeds, 0)

    def report(self, header: str, name: str, problem: str) -> str:
        """What the program says of a mutant."""
        return self._program(*self._found.words(header, name, problem, self._seeds))

    def unnoticed(self, header: str) -> dict[tuple[str, str], str]:
        """Reports that are not what a header's mutants must be reported as."""
        reports = {(name, at): self.report(header, name, at) for name, at in self._asked(header)}
        return {
            (name, at): report
            for (name, at), report in reports.items()
            if not is_named(report, self._mutants[header][name])
        }
