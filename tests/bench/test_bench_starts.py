# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a machine without a GPU: they run small, or say why not in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import child_process
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return child_process.run(command, env=environment)


@pytest.mark.parametrize("script", ["fine.py", "grids.py", "peers.py", "routing.py"])
def test_without_a_gpu_a_sentence_says_so(script: str) -> None:
    done = start(script)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith(f"{script}: error: no CUDA GPU is visible") and len(said.split()) > 9


def test_tiny_grids_are_checked_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "grids.json"
    done = start("grids.py", "--tiny", "--only", "ltx-2", "--tiles", 3, "--backward", "--out", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["bf16", "fp16"] * 2
    assert all(0 < row[name] <= 2 for row in rows for name in ("out", "dq", "dk", "dv"))
