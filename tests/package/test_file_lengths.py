# SPDX-License-Identifier: Apache-2.0
"""No source file is longer than CONTRIBUTING.md allows."""

from __future__ import annotations

from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "vsa", "tests", "bench", "examples", "third_party")
SUFFIXES = {".py", ".h", ".cpp", ".cu"}
MOST_LINES = 400


def too_long(tree: Path) -> dict[str, int]:
    """Lines of each source file that has too many; generated stubs, .pyi, are for no reader."""
    files = (file for folder in FOLDERS for file in (tree / folder).rglob("*"))
    lengths = {
        str(file.relative_to(tree)): len(file.read_text().splitlines())
        for file in files
        if file.suffix in SUFFIXES
    }
    assert lengths, f"no sources in {tree}"
    return {file: lines for file, lines in lengths.items() if lines > MOST_LINES}


def test_no_file_is_too_long() -> None:
    assert too_long(TREE) == {}


def test_a_longer_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "prim").mkdir(parents=True)
    for lines in (MOST_LINES, MOST_LINES + 1):
        (tmp_path / "csrc" / "prim" / f"{lines}.h").write_text("//\n" * lines)
    assert too_long(tmp_path) == {"csrc/prim/401.h": 401}
