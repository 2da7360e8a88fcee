# SPDX-License-Identifier: Apache-2.0
"""The examples that sparsify a transformer of diffusers run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_example_of_fine_tuning_learns_while_tiles_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = runpy.run_path(str(EXAMPLES / "finetune.py"))
    losses, densities = script["main"](["--steps", "12", "--end", "0.25"])
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert densities[0] == 1.0 and densities[-1] == 0.25 and len(set(densities)) == 4
    told = capsys.readouterr().out
    assert "tiles kept 100% -> 25%" in told and "gate 0 -> 0.0000" not in told


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "sparse_inference.py"))
    assert script["main"](["--topk", "1.0", "--steps", "2", "--size", "16"]) < 1e-4
    assert 1e-3 < script["main"](["--topk", "0.1", "--steps", "2", "--size", "16"]) < 1
    assert "steps on" in capsys.readouterr().out
