# SPDX-License-Identifier: Apache-2.0
"""``vsa train`` as a user calls it, on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vsa.cli import app
from vsa.cli.train import command, table
from vsa.measure.provenance import HEAD, read

pytest.importorskip("matplotlib")
SMALL = (
    *("--grid", "4x8x8", "--topk", "0.5", "--batch", "2", "--clips", "8", "--held-out", "4"),
    *("--real", "0", "--every", "2", "--device", "cpu"),
)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "250", "TERM": "dumb"}).invoke(
        app, ["train", *map(str, arguments)]
    )


def sentence(result):
    """What was said, without the box around it and its line breaks."""
    return re.sub(r"[\s│╭╮╰╯─|]+", " ", result.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    result = run(*SMALL, "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert "full" in result.output and "Predicting zero has a loss of" in result.output
    return out


def test_a_run_leaves_figures_a_picture_and_weights(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoint.pt", "loss.json", "loss.png"),
        *("weights-full.pt", "weights-vsa.pt"),
    ]
    found = read(folder / "loss.json")
    assert found["complete"] and set(HEAD) < set(found) and found["grid"] == [4, 8, 8]
    assert found["start"] is None and "ttention" in found["dense_kernel"]
    steps = [(row["step"], row["kind"]) for row in found["rows"]]
    assert steps == [(step, kind) for step in (0, 2, 3) for kind in ("full", "vsa")]
    full, vsa = found["rows"][-2:]
    assert full["flops"] == 3 * full["step_flops"] and vsa["train_ms"] > 0
    assert len(vsa["held_out_clips"]) == 4 and len(vsa["gate_coarse"]) == len(vsa["recall"]) == 2
    assert (folder / "loss.png").stat().st_size > 10_000


def test_resume_goes_on_and_runs_are_drawn_together(folder, tmp_path):
    result = run(*SMALL, "--steps", 3, "--seed", 1, "--kinds", "vsa", "--out", tmp_path / "other")
    assert result.exit_code == 0, result.output
    before = json.loads((folder / "loss.json").read_text())["rows"][:4]
    result = run(*SMALL, "--steps", 4, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    rows = json.loads((folder / "loss.json").read_text())["rows"]
    assert rows[:4] == before and [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    picture = tmp_path / "both.png"
    files = ("--read", folder / "loss.json", "--read", tmp_path / "other" / "loss.json")
    result = run(*files, "--plot", picture)
    assert result.exit_code == 0 and picture.stat().st_size > 10_000, result.output


def test_what_it_took_to_reach_a_loss_lies_between_evaluations():
    rows = [
        {"held_out": loss, "flops": 10 * step, "train_ms": 1000 * step}
        for step, loss in enumerate((2.0, 1.0, 1.2, 0.8))
    ]
    assert table.until(rows, 1.5) == (5, 0.5) and table.until(rows, 1.0) == (10, 1)
    flops, seconds = table.until(rows, 0.9)
    assert flops == pytest.approx(27.5) and seconds == pytest.approx(2.75)
    assert table.until(rows, 0.7) is None


def test_differences_are_taken_clip_by_clip():
    mine, theirs = ({"held_out_clips": losses} for losses in ([1.5, 3.5, 0.5], [1.0, 3.0, 0.0]))
    assert table.difference(mine, theirs) == (0.5, 0.0)


def test_a_limit_of_minutes_ends_a_run_cleanly(tmp_path):
    result = run(*SMALL, "--minutes", 0.02, "--keep", "weights", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "run" / "loss.json")
    assert found["complete"] and not (tmp_path / "run" / "checkpoint.pt").exists()
    assert (tmp_path / "run" / "weights-vsa.pt").exists()


def test_ctrl_c_finishes_the_step_of_every_kind(tmp_path, monkeypatch):
    import signal

    shown = []

    def interrupt(row):
        shown.append(row)
        if len(shown) == 4:
            signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr(command, "line", interrupt)
    result = run(*SMALL, "--steps", 50, "--out", tmp_path / "run")
    assert result.exit_code == 130 and "interrupted after 2 steps" in result.output
    found = read(tmp_path / "run" / "loss.json")
    assert not found["complete"] and [row["step"] for row in found["rows"]] == [0, 0, 2, 2]
    result = run(*SMALL, "--steps", 4, "--out", tmp_path / "run", "--resume")
    assert result.exit_code == 0 and read(tmp_path / "run" / "loss.json")["complete"]
    assert "It took no step" not in result.output
    result = run(
        *SMALL, "--steps", 3, "--out", tmp_path / "run", "--resume", "--kinds", "full, vsa"
    )
    assert result.exit_code == 0, result.output
    assert "It took no step, and has 4: give it more --steps" in sentence(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kinds", "sparse"), "kinds must be of full, vsa"),
        (("--grid", "4x8x9"), "grid must consist of whole tiles of 4x4x4 tokens"),
        (("--grid", "4x8"), "three whole numbers"),
        (("--topk", "2.5"), "topk must be a whole number"),
        (("--dtype", "fp16"), "dtype must be float32 or bfloat16"),
        (("--real", "2"), "real must be a share from 0 to 1"),
        (("--plot", "a.png"), "it needs runs to draw"),
        (("--resume",), "must hold a checkpoint.pt"),
        (("--out", "/proc/no"), "/proc/no cannot be"),
        (("--device", "meta"), "device must hold numbers"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and said in sentence(result), result.output
    assert not (tmp_path / "vsa-train" / "loss.json").exists()


def test_a_finished_run_is_not_overwritten_and_other_files_are_no_runs(folder, tmp_path):
    result = run(*SMALL, "--out", folder)
    assert result.exit_code == 2 and "holds a run" in sentence(result)
    result = run(*SMALL, "--seed", 5, "--out", folder, "--resume")
    assert result.exit_code == 2 and "seed must be 0 as in the run" in sentence(result)
    result = run(*SMALL, "--start", folder / "loss.json", "--out", tmp_path / "new")
    assert result.exit_code == 2 and "weights_only" not in result.output
    assert "must be a file of vsa train, but holds something else" in sentence(result)
    (tmp_path / "no.json").write_text("{}")
    result = run("--read", tmp_path / "no.json", "--plot", tmp_path / "no.png")
    assert result.exit_code == 2 and "must be a file of this project" in sentence(result)
    head = {name: None for name in HEAD} | {"rows": [{"step": 1}]}
    (tmp_path / "other.json").write_text(json.dumps(head))
    result = run("--read", tmp_path / "other.json", "--plot", tmp_path / "no.png")
    assert result.exit_code == 2 and "a file of vsa train is needed" in sentence(result)
