# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, how it refuses, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vsa
from vsa.backends import BACKENDS
from vsa.cli import app, info, options, patience
from vsa.measure import shapes, timing

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["--grid", "4,8,8", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--device", "cpu"]


def test_help_names_every_command_and_the_module_runs() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "vsa", "--help"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    commands = "info", "demo", "check", "bench", "profile", "wan", "train"
    assert all(command in text for command in commands)


def test_info_says_what_runs_and_why_not() -> None:
    result = RUNNER.invoke(app, ["info"])
    assert result.exit_code == 0
    assert vsa.__version__ in result.output
    assert all(name in result.output for name in BACKENDS)
    assert "compiled part" in result.output and "auto takes" in result.output
    assert "no: it needs a CUDA device of compute capability 9.0" in result.output


@pytest.mark.parametrize("measured", [True, False])
def test_info_says_whether_the_compiled_code_is_what_was_timed(
    measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"cuda": True, "architectures": ["sm_90a"], "cuda_version": "13.0", "compiler": "c++"}
    compiled = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    monkeypatch.setattr(compiled, "build_info", lambda: built)
    (tmp_path / "_build.json").write_text(json.dumps({"measured": measured}))
    monkeypatch.setattr(info, "files", lambda package: tmp_path)
    said = info.compiled_part()
    assert said.startswith("sm_90a by CUDA 13.0, ") and said.endswith("; c++")
    assert ("was not timed" in said) == (not measured)


def test_a_long_run_is_announced_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cpu = shapes.by_name("wan-1.3b-480p"), torch.device("cpu")
    rows = [(layer, 0.125, backward) for backward in (False, True)]
    monkeypatch.setattr(patience, "_rate", lambda *_: 1e11)
    flops = [vsa.flops(layer.grid, 12, 128, 0.125, backward=backward) for _, _, backward in rows]
    seconds = sum(6 * each.full + 8 * each.fine for each in flops) / 1e11
    said = patience.warning(rows, 5, cpu, torch.float32, "torch")
    assert f"some {seconds / 60:.0f} minutes" in said
    monkeypatch.setattr(patience, "_rate", lambda *_: 1e14)
    assert patience.warning(rows, 5, cpu, torch.float32, "torch") is None
    assert "emulator" in patience.warning(rows, 5, cpu, torch.float32, "emulated")
    assert patience.warning(rows, 5, torch.device("cuda"), torch.float32, "torch") is None


def test_the_speed_that_announces_is_that_of_dense_attention() -> None:
    rate = patience._rate(torch.device("cpu"), torch.float32)
    x = torch.randn(1, 4, 4096, 64)
    (time, *_) = timing.seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x), x.device, 1
    )
    assert 0.2 < 4 * 4 * 64 * 4096**2 / time / rate < 5


@pytest.mark.parametrize("arguments", [["bench", "--json"], ["wan", "--tiny", "--json"]])
def test_files_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    for file in (tmp_path / "folder.json", Path("/proc/no.json")):
        result = RUNNER.invoke(app, [*arguments, str(file)])
        assert result.exit_code == 2 and "cannot be" in result.output, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_the_version_and_short_help_are_there() -> None:
    assert RUNNER.invoke(app, ["--version"]).output == f"vsa {vsa.__version__}\n"
    for command in ([], ["bench"], ["info"]):
        short, long = (RUNNER.invoke(app, [*command, name]) for name in ("-h", "--help"))
        assert short.exit_code == 0 and short.output == long.output and "Usage" in short.output


def test_types_have_the_names_that_tables_print() -> None:
    assert options.parse_dtype("bfloat16") == options.parse_dtype("bf16") == torch.bfloat16
    assert options.parse_dtype("float32") == torch.float32
