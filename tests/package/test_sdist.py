# SPDX-License-Identifier: Apache-2.0
"""The source distribution holds what its own tests need."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
FILES = (
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
    "video_sparse_attention.py",
)
LEFT_OUT = {".pyc", ".so", ".pyd"}


def folders() -> list[str]:
    """The folders that README.md's tree names: a test of the sdist looks for each of them."""
    return re.findall(r"^(\w+)/ ", (TREE / "README.md").read_text(), re.MULTILINE)


def test_the_sdist_holds_sources_tests_benchmarks_and_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command, "sdist", "--dist-dir", str(tmp_path)], check=True, cwd=TREE)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        held = {name.partition("/")[2] for name in contents.getnames()}
    found = [path for folder in folders() for path in (TREE / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(TREE)) for path in found if path.suffix not in LEFT_OUT}
    wanted |= set(FILES)
    made_by_builds = {"vsa/_build.json"}
    assert sorted(wanted - held - made_by_builds) == []
    assert {"vsa", "csrc", "tests", "bench", "docs", "findings"} <= set(folders())
    assert {"bench/pictures/demo.png", "docs/pictures/demo.png", "bench/results_table.py"} <= held
