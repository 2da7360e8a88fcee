# SPDX-License-Identifier: Apache-2.0
"""``vsa wan`` in several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
from cli import wan_jobs
from distributed import ranks as ranks_of
from typer.testing import CliRunner

from vsa.cli import app
from vsa.cli.wan import ranks


def test_processes_denoise_together(tmp_path: Path) -> None:
    ranks_of.run(wan_jobs.two, 2, tmp_path)


def test_without_torchrun_the_command_starts_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(command: list[str]) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=3)

    arguments = ["wan", "--tiny", "--device", "cpu", "--ranks", "2"]
    monkeypatch.setattr(ranks.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["vsa", *arguments])
    assert CliRunner().invoke(app, arguments).exit_code == 3
    assert started[0][0] == sys.executable and started[0][-len(arguments) - 2 :] == [
        *("-m", "vsa", *arguments)
    ]
    assert (
        "--nproc-per-node" in started[0] and started[0][started[0].index("--standalone") + 2] == "2"
    )
