# SPDX-License-Identifier: Apache-2.0
"""vsa profile: stages on a CPU, and reading a report of ncu."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vsa
from vsa.backends import BACKENDS
from vsa.cli import app
from vsa.cli.profile import ncu_report as ncu_report
from vsa.measure import nvtx_ranges, stage_hooks

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["profile", "--grid", "4,8,8", "--heads", "1", "--device", "cpu", "--repeats", "1"]
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"

# MADE UP: the form is that of ncu --csv --page raw, no number was measured.
HEAD = [
    ("ID", ""),
    ("Kernel Name", ""),
    ("gpu__time_duration.sum", "us"),
    ("sm__cycles_elapsed.max", "cycle"),
    ("device__attribute_multiprocessor_count", ""),
    ("sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active", "%"),
    ("lts__t_sector_hit_rate.pct", "%"),
    (STALL.format("wait"), "inst"),
    (STALL.format("long_scoreboard"), "inst"),
    (STALL.format("barrier"), "inst"),
    (STALL.format("membar"), "inst"),
    (STALL.format("selected"), "inst"),  # not a stall
    (STALL.format("wait_not_issued"), "inst"),  # a part of wait
]
FORWARD = (
    "void vsa::launch::persistent_kernel<vsa::FineForward<vsa::FineForwardConfig<(int)128, "
    "vsa::Bf16>>>(vsa::FineForward<vsa::FineForwardConfig<(int)128, vsa::Bf16>>::Params)"
)
ROWS = [
    ["0", FORWARD, "1,000.0", "1,000", "100", "50.0", "80.0", "2.0", "1.0", "0.5", "0.1", "9", "9"],
    [
        "1",
        "void at::native::sum(int)",
        "5.0",
        "10",
        "100",
        "n/a",
        "10.0",
        "0",
        "7",
        "0",
        "0",
        "9",
        "9",
    ],
    ["2", FORWARD, "3,000.0", "3,000", "100", "60.0", "90.0", "4.0", "1.0", "0.5", "0.1", "9", "9"],
]


def write(path: Path, rows: list[list[str]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([*zip(*HEAD, strict=True), *rows])
    path.write_text("==PROF== Connected to process 1\n" + text.getvalue())
    return path


def test_launches_of_a_kernel_are_averaged_and_what_is_absent_stays_absent(tmp_path: Path) -> None:
    ours, other = ncu_report.read(write(tmp_path / "report.csv", ROWS))
    assert ours.name == "persistent_kernel<FineForward<FineForwardConfig<(int)128, Bf16>>>"
    assert ours.launches == 2 and ours.seconds == pytest.approx(2e-3) and ours.cycles == 2000
    assert ours.percent["tensor pipe"] == 55 and ours.percent["L2 hits"] == 85
    assert ours.percent["DRAM"] is None
    assert ours.stalls == {"wait": 3.0, "long_scoreboard": 1.0, "barrier": 0.5, "membar": 0.1}
    assert list(ours.stalls)[:2] == ["wait", "long_scoreboard"]
    assert other.name == "sum" and other.percent["tensor pipe"] is None
    assert other.mfu(1e9) is None


def test_mfu_counts_the_products_of_each_of_our_kernels(tmp_path: Path) -> None:
    ours, _ = ncu_report.read(write(tmp_path / "report.csv", ROWS))
    peak = 2000 * 100 * 4096
    assert ours.mfu(peak / 4) == pytest.approx(0.25)
    backward = [[cell.replace("Forward", "BackwardKeys") for cell in ROWS[0]]]
    (keys,) = ncu_report.read(write(tmp_path / "keys.csv", backward))
    assert keys.mfu(peak / 4) == pytest.approx(1.0)  # four products of two, in half the clocks


def test_a_report_becomes_a_table(tmp_path: Path) -> None:
    report = write(tmp_path / "report.csv", ROWS)
    result = RUNNER.invoke(app, ["profile", "--shape", "wan-1.3b-480p", "--read", str(report)])
    assert result.exit_code == 0, result.output
    assert "FineForward" in result.output and "2,000.0" in result.output
    assert "55.0 %" in result.output and "wait 3.00" in result.output
    assert "persistent_kernel<" in result.output  # not cut off in a log


@pytest.mark.parametrize("text", ["", '"ID","Kernel Name"\n', '"ID","Name"\n"",""\n"0","k"\n'])
def test_something_else_is_not_read_as_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ValueError, match="--page raw"):
        ncu_report.read(tmp_path / "other.csv")
    result = RUNNER.invoke(app, ["profile", "--read", str(tmp_path / "other.csv")])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_a_run_on_a_cpu_names_every_stage_and_prints_commands() -> None:
    result = RUNNER.invoke(app, [*SMALL, "--head-dim", "16", "--backward"])
    assert result.exit_code == 0, result.output
    assert all(stage in result.output for stage in (*stage_hooks.FORWARD, *stage_hooks.BACKWARD))
    for command in ("nsys profile -t cuda,nvtx", "ncu --profile-from-start off", "--read vsa.csv"):
        assert command in result.output
    assert "--backend" not in result.output and "--backward" in result.output


def test_a_shape_and_a_grid_are_one_too_many() -> None:
    result = RUNNER.invoke(app, [*SMALL, "--shape", "ltx-video"])
    assert result.exit_code == 2 and "grid" in result.output


def test_the_ranges_of_a_gpu_are_timed_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:  # stands for a GPU's: this shows the bookkeeping only
        clock = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.clock += 1
            self.at = Event.clock

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    opened: list[str] = []
    asked: list[str] = []

    class Runtime:
        def __getattr__(self, name: str):
            return lambda: asked.append(name)

    def nvtx_range(name: str) -> contextlib.AbstractContextManager:
        opened.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(nvtx_ranges.nvtx, "range", nvtx_range)

    def call(open_range: stage_hooks.Range) -> None:
        with open_range("forward"), open_range("fine"):
            pass

    times = nvtx_ranges.record(call, torch.device("cuda"), repeats=3)
    assert times == {"forward": 3.0, "fine": 1.0}
    assert opened == ["vsa forward", "vsa fine"] * 3
    assert asked == ["cudaProfilerStart", "cudaProfilerStop"]


def seen(backend: str, gated: bool) -> list[str]:
    """Stages in the order in which they end, forward and backward."""
    names: list[str] = []

    @contextlib.contextmanager
    def open_range(name: str) -> Iterator[None]:
        yield
        names.append(name)

    kind = torch.float32 if backend == "torch" else torch.bfloat16
    q, k, v, *gates = torch.randn(5, 1, 4, 4, 8, 1, 64, dtype=kind).requires_grad_().unbind()
    named = dict(zip(("gate_coarse", "gate_fine"), gates, strict=True)) if gated else {}
    with stage_hooks.named(open_range):
        vsa.attention(q, k, v, 1, backend=backend, **named).sum().backward()
    return names


@pytest.mark.parametrize("backend", ["torch", "emulated"])
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no gates"])
def test_ranges_cover_each_stage_once(backend: str, gated: bool) -> None:
    names = seen(backend, gated)
    # Our own kernels make the coarse output out of the scores, while they select.
    forward = ["coarse", "select", *["coarse"] * (gated and backend == "torch"), "fine"]
    forward += ["combine"] * (backend == "torch" or not gated)  # else it is the end of the fine one
    # Those of q, k and v, which share a grid. Our own kernels add them to what they store.
    of_means = gated and backend == "torch"
    backward = [stage_hooks.FINE_BACKWARD] + [stage_hooks.MEANS_BACKWARD] * of_means
    assert names[: len(forward)] == forward
    assert sorted(names[len(forward) :]) == sorted(backward)


def test_functions_are_themselves_outside_and_after_an_error() -> None:
    backend = BACKENDS["torch"]
    before = backend.select
    with pytest.raises(RuntimeError, match="stop"), stage_hooks.named(contextlib.nullcontext):
        assert backend.select != before
        raise RuntimeError("stop")
    assert backend.select == before
