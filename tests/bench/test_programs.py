# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that are one CUDA file each still compile with the headers of today."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_program_of_boxes_out_of_bounds_compiles_without_a_word(tmp_path: Path) -> None:
    program = tmp_path / "program"
    command = ["nvcc", *FLAGS, "-o", program, ROOT / "bench" / "out_of_bounds.cu"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert program.is_file()
