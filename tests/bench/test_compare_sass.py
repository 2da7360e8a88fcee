# SPDX-License-Identifier: Apache-2.0
"""bench/compare_sass.py on objects of the host's compiler, which are ELF files like cubins."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import compare_sass

SOURCE = "int first(int x) {{ return x * {factor}; }} int second(int x) {{ return x - 5; }}\n"


@pytest.fixture
def built(compiler, tmp_path: Path):
    def build(name: str, text: str) -> dict[str, list[str]]:
        source, cubin = tmp_path / f"{name}.cpp", tmp_path / f"{name}.cubin"
        source.write_text(text)
        flags = ["-O1", "-ffunction-sections", "-c"]
        subprocess.run([compiler, *flags, source, "-o", cubin], check=True)
        return compare_sass.kernels([cubin])

    return build


def test_other_names_are_the_same_code(built) -> None:
    old = built("old", SOURCE.format(factor=9))
    new = built("new", SOURCE.format(factor=9).replace("first", "renamed"))
    assert old != new and compare_sass.compare(old, new) == (2, [])


def test_other_code_is_named_on_both_sides(built) -> None:
    old, new = (built(f"by{factor}", SOURCE.format(factor=factor)) for factor in (9, 11))
    same, different = compare_sass.compare(old, new)
    assert same == 1 and len(different) == 2
    assert different[0].startswith("only in NEW: by11: ") and "first" in different[0]
    assert different[1].startswith("only in OLD: by9: ") and "first" in different[1]


def test_twice_the_same_code_counts_twice(built) -> None:
    once = built("once", SOURCE.format(factor=9))
    twice = built("twice", SOURCE.format(factor=9) + "int third(int x) { return x - 5; }\n")
    same, different = compare_sass.compare(once, twice)
    assert same == 2 and [line.split(":")[0] for line in different] == ["only in NEW"]
