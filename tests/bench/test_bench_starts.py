# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a machine without a GPU: they run small, or say why not in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import forked
import pytest

from vsa.measure.provenance import HEAD

BENCH = Path(__file__).resolve().parents[2] / "bench"


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return forked.run(BENCH / script, *arguments, env=environment)


@pytest.mark.parametrize(
    "script",
    [
        "peers.py",
        "coarse_select.py",
        "sub_blocks.py",
        "parallel.py",
        "tail.py",
        "masks.py",
        "low_precision.py",
        "one_pass.py",
        "host_power.py",
        "sanitize.py",
        "work_tile_clocks.py",
    ],
)
def test_without_a_gpu_a_sentence_says_so(script: str) -> None:
    done = start(script)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith(f"{script}: error: ") and len(said.split()) > 9
    assert "GPU" in said


def test_a_tiny_case_of_every_precision_runs_on_the_emulator(tmp_path: Path) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    file = tmp_path / "low_precision.json"
    done = start("low_precision.py", "--smoke", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    whats = ["native", "int8", "fp8", "quantise int8", "quantise fp8"]
    assert [row["what"] for row in found["rows"]] == 2 * whats + whats[:3]
    assert [row["lists"] for row in found["rows"]][::5] == ["random", "correlated", "own"]
    assert {row["calls"] for row in found["rows"]} == {"eager"}  # no graphs without a GPU
    assert all(row["error"] < 0.065 for row in found["rows"] if row["error"] is not None)


def test_a_tiny_case_of_one_pass_and_two_runs_on_the_emulator(tmp_path: Path) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    file = tmp_path / "one_pass.json"
    done = start("one_pass.py", "--smoke", "--layers", "4x8x12:2", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert [row["pattern"] for row in found["rows"]] == ["random", "correlated"]
    assert all(row["dq from two passes"] < 0.05 for row in found["rows"])


def test_balanced_lists_share_all_of_their_key_tiles_or_none(tmp_path: Path) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    file = tmp_path / "one_pass.json"
    options = ("--smoke", "--balanced", "--layers", "4x8x16:2")
    done = start("one_pass.py", *options, "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["pattern"], row["shared"]) for row in rows] == [
        ("all shared", 1.0),
        ("none shared", 0.0),
    ]


def test_a_tiny_case_of_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    done = start("coarse_select.py", "--smoke", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert found["commit"] == "abc" and found["command"].startswith(
        "bench/coarse_select.py --smoke"
    )
    stages = {row["stage"] for row in found["rows"]}
    assert {"means", "scores", "select", "fine", "coarse", "attention, backward"} <= stages
    assert all(row["ms"] > 0 and row["results"] >= 0 for row in found["rows"])


def test_a_tiny_case_of_sub_blocks_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "sub_blocks.json"
    done = start("sub_blocks.py", "--smoke", "--runs", 4, "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert found["complete"] and 0 < row["worst error of its bound"] <= 1
    assert row["rows beyond it"] == 0
    for part in ("means of q and k", "scores", "scores + select", "attention, coarse gate"):
        assert all(ms > 0 for ms in row[f"{part}, eager, ms"])


def test_parts_of_a_tiny_call_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "parts.json"
    done = start("host_parts.py", "--tiny", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    whats = [row["what"] for row in found["rows"]]
    assert found["complete"] and whats == ["plain", "gates"] * 2  # the second two with text
    for row in found["rows"]:
        times = {name: x for name, x in row.items() if name.endswith("host us")}
        assert len(times) == 11 and min(times.values()) > 0
        # A part against all: of single calls on a busy machine no closer two keep their order.
        assert times["key, host us"] < times["both, host us"]


def test_a_tiny_call_with_a_tail_and_without(tmp_path: Path) -> None:
    file = tmp_path / "tail.json"
    done = start("tail.py", "--tiny", "--device", "cpu", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    kinds = [(row["gates"], row["direction"]) for row in found["rows"]]
    directions = "forward", "forward+backward"
    assert kinds == [(gates, each) for gates in ("none", "coarse") for each in directions]
    assert found["complete"] and found["command"].startswith("bench/tail.py --tiny")
    assert all(row["tail ms"] > 0 and row["without ms"] > 0 for row in found["rows"])
    assert set(found["rows"][1]["errors"]) == {"out", "lse", "dq", "dk", "dv"}


def test_benchmarks_import_nothing_from_the_command_line() -> None:
    for path in BENCH.rglob("*.py"):
        assert "vsa.cli" not in path.read_text(), path


def test_the_command_line_imports_no_benchmark() -> None:
    names = {path.stem for path in (*BENCH.glob("*.py"), *BENCH.glob("*/__init__.py"))}
    names |= {"comparison", "bench"}
    for path in (BENCH.parent / "vsa").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in names, f"{path}: {line}"


def test_a_tiny_call_under_a_mask(tmp_path: Path) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    file = tmp_path / "masks.json"
    done = start("masks.py", "--tiny", "--device", "cpu", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["complete"] and found["error"] < 0.02
    assert [row["direction"] for row in found["rows"]] == ["forward", "forward+backward"]
    assert all(row["masked ms"] > 0 and row["unmasked ms"] > 0 for row in found["rows"])


def test_the_picture_of_masks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by the extra demo")
    file = tmp_path / "masks.png"
    done = start("draw_masks.py", "--out", file)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_tiny_video_over_a_cache(tmp_path: Path) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    file = tmp_path / "streaming.json"
    done = start("streaming.py", "--tiny", "--device", "cpu", "--commit", "abc", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["complete"] and found["advance us"] > 0
    assert [(row["chunk"], row["held"]) for row in found["rows"]] == [(0, 1), (1, 2), (5, 2)]
    names = "sparse", "reused", "concatenated", "dense"
    assert all(row[f"{name} ms"] > 0 for row in found["rows"] for name in names)
