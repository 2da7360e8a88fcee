# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that are one CUDA file still compile with the headers of today."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from work_tile_marks import marked_headers

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("source", "with_marks", "more"),
    [
        ("out_of_bounds.cu", False, ()),
        # To PTX: ptxas and the host's compiler take twice as long as all that comes before.
        ("work_tile_clocks.cu", True, ("-ptx",)),
    ],
)
def test_a_program_compiles_without_a_word(
    tmp_path: Path, source: str, with_marks: bool, more: tuple[str, ...]
) -> None:
    program = tmp_path / "program"
    headers = marked_headers(tmp_path) if with_marks else ROOT / "csrc"
    command = ["nvcc", *FLAGS, *more, f"-I{headers}", "-o", program, ROOT / "bench" / source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert program.is_file()
