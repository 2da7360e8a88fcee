# SPDX-License-Identifier: Apache-2.0
"""vsa bench: its figures, tables and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.cli.bench import command as command
from vsa.cli.bench.measurement import Measurement
from vsa.cli.bench.stage_table import parts
from vsa.cli.bench.table import time_and_rate
from vsa.measure import shapes
from vsa.measure.provenance import HEAD

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["--grid", "4,8,8", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--device", "cpu"]


def test_bench_says_where_its_figures_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/vsa", "bench", "--json", "of mine.json"])
    figures = tmp_path / "bench.json"
    result = RUNNER.invoke(app, ["bench", *SMALL, "--forward-only", "--json", str(figures)])
    assert result.exit_code == 0, result.output
    about = json.loads(figures.read_text())
    assert list(about)[: len(HEAD)] == list(HEAD)
    assert about["device"] and about["vsa"] == vsa.__version__ and about["date"]
    assert about["torch"] == torch.__version__ and about["driver"] is None
    assert about["backend"] == "torch" and about["dtype"] == "float32"
    assert about["command"] == "vsa bench --json 'of mine.json'"


def test_bench_names_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, busy in ((0.1, False), (0.9, True)):
        monkeypatch.setattr(command, "other_load", lambda load=load: load)
        result = RUNNER.invoke(app, ["bench", *SMALL, "--forward-only"])
        assert result.exit_code == 0, result.output
        assert ("kept 90% of this machine's cores busy" in result.output) == busy


def test_the_old_name_of_patterns_still_works_and_is_not_shown(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    arguments = [*SMALL, "--forward-only", "--lists", "random", "--json", str(figures)]
    assert RUNNER.invoke(app, ["bench", *arguments]).exit_code == 0
    assert [row["pattern"] for row in json.loads(figures.read_text())["rows"]] == ["random"]
    shown = RUNNER.invoke(app, ["bench", "--help"]).output
    assert "--patterns" in shown and "--lists" not in shown


@pytest.mark.parametrize("sweep", [None, "density"])
def test_a_picture_is_drawn_again_from_the_figures(tmp_path: Path, sweep: str | None) -> None:
    figures, first, again = (tmp_path / name for name in ("b.json", "first.png", "again.png"))
    arguments = ["--sweep", sweep] if sweep else ["--topk", "0.5", "--stages"]
    arguments += [*SMALL, "--forward-only", "--json", str(figures), "--plot", str(first)]
    assert RUNNER.invoke(app, ["bench", *arguments]).exit_code == 0
    result = RUNNER.invoke(app, ["bench", "--read", str(figures), "--plot", str(again)])
    assert result.exit_code == 0, result.output
    assert imread(again).shape == imread(first).shape
    written = json.loads(figures.read_text())["rows"]
    rows = [Measurement.of_row(row) for row in written]
    assert [row.row()["dense_ms"] for row in rows] == pytest.approx(
        [row["dense_ms"] for row in written]
    )
    assert [1e3 * row.sparse for row in rows] == pytest.approx(
        [row["sparse_ms"] for row in written]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rows": []}, "a row at least"), ({"rows": [{"a": 1}]}, "rows must be those of vsa bench")],
)
def test_figures_of_something_else_are_not_drawn(tmp_path: Path, change: Any, words: str) -> None:
    figures, picture = tmp_path / "b.json", tmp_path / "b.png"
    figures.write_text(json.dumps(dict.fromkeys(HEAD) | change))
    result = RUNNER.invoke(app, ["bench", "--read", str(figures), "--plot", str(picture)])
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    figures.write_text(json.dumps(change))
    result = RUNNER.invoke(app, ["bench", "--read", str(figures), "--plot", str(picture)])
    assert result.exit_code == 2 and "lacks command, date" in " ".join(result.output.split())


def test_bench_times_and_draws_stages(tmp_path: Path) -> None:
    figures, picture, plain = (tmp_path / name for name in ("b.json", "b.png", "plain.png"))
    arguments = ["--topk", "0.5", "--stages", "--json", str(figures), "--plot", str(picture)]
    result = RUNNER.invoke(app, ["bench", *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    assert "stages, forward+backward" in result.output and "select" in result.output
    forward, both = (row["stages_ms"] for row in json.loads(figures.read_text())["rows"])
    assert {"forward", "coarse", "select", "fine"} <= set(forward) and "backward" not in forward
    assert {"backward", "backward: fine"} <= set(both)
    for times in (forward, both):
        for whole, rows in parts(times).items():
            assert sum(rows.values()) == pytest.approx(times[whole]) and min(rows.values()) >= 0
    RUNNER.invoke(app, ["bench", *SMALL, "--topk", "0.5", "--plot", str(plain)])
    tall, flat = (imread(path).shape[0] for path in (picture, plain))
    assert tall > flat


def test_what_the_gpu_did_stands_below_the_time() -> None:
    assert time_and_rate(0.0015, 0.01, 500.0, {"clock": 1700.0, "power": 699.6}) == (
        "1.5 ms ±1%\n500 TFLOP/s\n1700 MHz, 700 W"
    )


@pytest.mark.parametrize(("sweep", "rows"), [("length", 2), ("density", 6)])
def test_bench_sweeps_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sweep: str, rows: int
) -> None:
    monkeypatch.setattr(shapes, "CPU_LENGTHS", (vsa.Grid((4, 4, 8)), vsa.Grid((4, 8, 8))))
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [*SMALL[2:], "--forward-only", "--json", str(figures), "--plot", str(picture)]
    arguments += SMALL[:2] if sweep == "density" else []
    result = RUNNER.invoke(app, ["bench", "--sweep", sweep, *arguments])
    assert result.exit_code == 0, result.output
    assert len(json.loads(figures.read_text())["rows"]) == rows
    assert picture.read_bytes().startswith(b"\x89PNG")
