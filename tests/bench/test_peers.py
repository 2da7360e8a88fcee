# SPDX-License-Identifier: Apache-2.0
"""bench/peers.py: archives, workers that fail alone, the command, its report and its patterns."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

import peers
import vsa
from comparison import report, worker
from comparison.archives import Unavailable, unpacked
from comparison.cute import CudnnBsaInFp8
from comparison.problem import Case, Problem
from vsa.measure import patterns
from vsa.measure.provenance import HEAD

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

CPU = torch.device("cpu")
SCRIPT = Path(peers.__file__)


# ---- archives -----------------------------------------------------------------------------------


def test_archives_and_folders_are_found_in_any_of_the_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "library.so"
    source.write_text("code")
    with tarfile.open(tmp_path / "second" / "fa3.tar.xz", "w:xz") as tar:
        tar.add(source, "fa3/library.so")
    folders = [tmp_path / "first", tmp_path / "second"]
    found = unpacked("fa3", folders)
    assert (found / "library.so").read_text() == "code" and unpacked("fa3", folders) == found
    (tmp_path / "first" / "tk_vsa").mkdir()
    assert unpacked("tk_vsa", folders) == tmp_path / "first" / "tk_vsa"
    with pytest.raises(Unavailable, match=r"cudnn_bsa.tar.xz was looked for in .*first, .*second"):
        unpacked("cudnn_bsa", folders)


def test_cudnns_fp8_is_skipped_where_it_has_no_kernel() -> None:
    kernel = object.__new__(CudnnBsaInFp8)

    def reason(grid: tuple[int, int, int], head_dim: int) -> str:
        with pytest.raises(Unavailable) as caught:
            kernel.plan(Problem(Case(grid, 1, head_dim, "random", 0.5), CPU))
        return str(caught.value)

    assert reason((4, 4, 8), 64) == "it needs head_dim 128, but it is 64"
    assert reason((4, 4, 9), 128).startswith("it needs whole tiles")
    kernel.plan(Problem(Case((4, 4, 8), 1, 128, "random", 0.5), CPU))
    ragged = Problem(Case((4, 4, 8), 1, 128, "random", 0.5), CPU)
    ragged.selection = vsa.Selection.from_mask(torch.tensor([[[[True, True], [True, False]]]]))
    with pytest.raises(Unavailable, match="as many key tiles in every row"):
        kernel.plan(ragged)


# ---- the command --------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, *arguments)


def in_a_fork(command: list[str], to: Path, patience: float, note: Callable) -> str | None:
    """What peers.watched does, without a new interpreter that imports PyTorch."""
    done = forked.run(*command[1:])
    for line in to.read_text().splitlines():
        note(json.loads(line))
    return None if done.returncode == 0 else done.stderr


def test_the_command_measures_what_it_can_and_says_why_not_the_rest(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """Workers are forked, but for one that is a process as the command starts it."""
    real, started = peers.watched, []

    def watched(command: list[str], *rest: Any) -> str | None:
        started.append(command[-2])
        return (real if command[-2] == "vsa_int8" else in_a_fork)(command, *rest)

    monkeypatch.setattr(peers, "watched", watched)
    out = tmp_path / "peers.json"
    options = "--tiny", "--head-dims", "64", "--patterns", "random", "--layers", "4x4x9:1"
    peers.main([*options, "--seconds", "0.001", "--commit", "abc", "--out", str(out)])
    said = capsys.readouterr().out
    assert len(started) > 4 and "vsa_int8" in started
    found = json.loads(out.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert found["commit"] == "abc" and found["torch"] == torch.__version__
    assert found["command"].startswith("bench/peers.py --tiny --head-dims 64")
    measured = {(r["kernel"], r["direction"]) for r in found["rows"] if "tflops" in r}
    ours = {(x, y) for x in ("vsa", "whole") for y in ("forward", "backward")}
    low = {(x, "forward") for x in ("vsa_int8", "vsa_fp8")}
    assert measured == {*ours, *low, ("flex", "forward")}
    skipped = {row["kernel"] for row in found["rows"] if "skipped" in row}
    others = set(worker.KERNELS) - {"vsa", "whole"}
    assert skipped == others
    assert "vsa, int8, 4x4x9, d 64, random, backward: skipped, int8 is for infer" in said
    forward = [x for x in found["rows"] if "tflops" in x and x["direction"] == "forward"]
    errors = {x["kernel"]: x["errors"]["out"] for x in forward}
    assert errors["vsa"] < 0.005 < 0.02 < errors["vsa_int8"] < errors["vsa_fp8"] < 0.065
    assert "FlashAttention-3: skipped, it needs a CUDA GPU" in said
    assert not report.inconsistent(found["rows"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tiny", "--patterns", "captured"], "the captured pattern comes from a file"),
        (["--tiny", "--layers", "4x4:2"], "written as 32x32x32:12"),
        (["--tiny", "--peers", "/nowhere"], "folders that exist"),
        (["--tiny", "--out", "/nowhere/peers.json"], "folder that exists"),
        (["--tiny", "--captured", "/nowhere.pt"], "a file that exists"),
    ],
)
def test_bad_options_are_refused_at_once(arguments, complaint: str, capsys) -> None:
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert complaint in capsys.readouterr().err


def test_a_profiler_sees_the_second_of_two_forwards_on_other_inputs(monkeypatch) -> None:
    given = []

    class Spy(worker.KERNELS["vsa"]):
        def forward(self, x):
            given.append(x)
            return super().forward(x)

    monkeypatch.setitem(worker.KERNELS, "vsa", Spy)
    options = "--tiny", "--head-dims", "64", "--patterns", "random", "--layers", "4x4x8:1"
    peers.main([*options, "--once", "vsa"])
    first, second = given
    assert first.q.shape == second.q.shape and not torch.equal(first.q, second.q)


def watched(
    tmp_path: Path, script: str, patience: float, said: str = ""
) -> tuple[list, str | None]:
    to, rows = tmp_path / "rows", []
    to.write_text(said)
    command = [sys.executable, "-c", f"import os, time\nto = open({str(to)!r}, 'a')\n{script}"]
    return rows, peers.watched(command, to, patience, rows.append)


ROW = """to.write('{"kernel": "vsa"}\\n'); to.flush()\n"""


def test_a_worker_that_hangs_is_stopped_and_keeps_its_rows(tmp_path: Path) -> None:
    # Its row is there from the beginning: a busy machine may take a second to start a process.
    rows, why = watched(tmp_path, "time.sleep(60)", 1.0, '{"kernel": "vsa"}\n')
    assert rows == [{"kernel": "vsa"}] and why == "it gave no row for 1 s and was stopped"


def test_a_worker_that_crashes_keeps_its_rows_and_its_last_words(tmp_path: Path) -> None:
    rows, why = watched(tmp_path, ROW + "print('bad address', flush=True); os.abort()", 60.0)
    assert len(rows) == 1
    assert why is not None and "SIGABRT" in why and why.endswith("bad address")


def test_a_worker_that_ends_well_has_nothing_to_say(tmp_path: Path) -> None:
    assert watched(tmp_path, ROW + ROW, 60.0) == ([{"kernel": "vsa"}] * 2, None)


# ---- the report ---------------------------------------------------------------------------------


def row(kernel: str, tflops: float, **more):
    about = {"grid": [4, 8, 8], "heads": 2, "head_dim": 64, "direction": "forward"}
    dense = kernel in ("fa3", "cudnn")
    kind = {"dense": dense, "pattern": None if dense else "random", "shared": 0.1}
    numbers = {"ms": 1.0, "spread": 0.0, "gpu": {}, "errors": {"out": 1e-3}, "inputs": 1}
    return {"kernel": kernel, "tflops": tflops, **about, **kind, **numbers, **more}


def test_shares_are_of_fa3_or_else_of_cudnn() -> None:
    rows = [row("vsa", 90.0), row("cudnn", 100.0), row("fa3", 120.0), row("vsa", 1.0, heads=3)]
    ours, *_, other = report.with_shares(rows)
    assert (ours["baseline"], ours["share"]) == ("fa3", 0.75) and "share" not in other
    assert ours["speedup"] == 1.0  # both take a millisecond
    ours, *_ = report.with_shares(rows[:2])
    assert (ours["baseline"], ours["share"]) == ("cudnn", 0.9)


def test_tables_name_every_kernel_and_unequal_inputs_are_found() -> None:
    rows = [row("vsa", 90.0), row("tk_vsa", 50.0, inputs=2), row("fa3", 120.0)]
    assert len(list(report.tables(rows))) == 1
    assert report.inconsistent(rows) == ["((4, 8, 8), 2, 64, 'random')"]
    assert "failed, bad" in report.line({"kernel": "vsa", "failed": "bad"})


def test_a_dense_kernel_runs_each_layer_once() -> None:
    cases = [Case((4, 8, 8), 2, d, kind, 0.5) for d in (64, 128) for kind in patterns.KINDS]
    assert len(worker.cases_of("vsa", cases)) == 6
    assert len(worker.cases_of("fa3", cases)) == len(worker.cases_of("whole", cases)) == 2


# ---- captured patterns --------------------------------------------------------------------------


def test_captured_patterns_come_back_and_are_checked(tmp_path: Path) -> None:
    grid, file = vsa.Grid((4, 8, 12)), tmp_path / "captured.pt"
    chosen = patterns.selection("random", grid, 3, 2, CPU)
    patterns.save(file, {"model": "none"}, {"4x8x12": chosen})
    found = patterns.selection("captured", grid, 2, 2, CPU, file)
    assert torch.equal(found.mask(), chosen.mask()[:, :2]) and patterns.layers(file) == ["4x8x12"]
    for heads, topk, other in ((4, 2, grid), (2, 3, grid), (2, 2, vsa.Grid((4, 4, 4)))):
        with pytest.raises(ValueError, match=r"captured.pt (holds|keeps) "):
            patterns.selection("captured", other, heads, topk, CPU, file)
    with pytest.raises(ValueError, match=r"needs the file that bench/captured\.py writes"):
        patterns.selection("captured", grid, 2, 2, CPU)


def test_reuse_is_one_for_disjoint_rows_and_all_for_equal_ones() -> None:
    mask = torch.eye(6, dtype=torch.bool)[None, None]
    assert patterns.reuse(vsa.Selection.from_mask(mask), 3) == 1
    assert patterns.reuse(vsa.Selection.from_mask(mask[:, :, :1].expand(1, 1, 7, 6)), 3) == 3


def test_reuse_follows_each_heads_axis() -> None:
    grid, kv_grid = vsa.Grid((12, 8, 12)), vsa.Grid((4, 4, 24))
    along_t = torch.eye(6, dtype=torch.bool).repeat(3, 1)
    along_w = torch.eye(6, dtype=torch.bool).repeat_interleave(3, 0)
    selection = vsa.Selection.from_mask(torch.stack((along_t, along_w))[None], grid, kv_grid)
    axes = patterns.chosen_axes(selection)
    assert axes.tolist() == [[1, 0]] and patterns.reuse(selection, 3, axes) == 3
    assert patterns.reuse(selection, 3, 1 - axes) == 1 < patterns.reuse(selection, 3) < 3
