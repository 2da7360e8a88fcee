# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, how it refuses, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import vsa
from vsa.backends import BACKENDS
from vsa.cli import app, options, patience
from vsa.cli.bench.case import Case
from vsa.cli.bench.measurement import Measurement
from vsa.cli.bench.stage_table import parts
from vsa.cli.bench.table import time_and_rate
from vsa.measure import patterns, shapes, timing
from vsa.measure.provenance import HEAD

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["--grid", "4,8,8", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--device", "cpu"]


def test_help_names_every_command_and_the_module_runs() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "vsa", "--help"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    commands = "info", "demo", "check", "bench", "profile", "wan"
    assert all(command in text for command in commands)


def test_info_says_what_runs_and_why_not() -> None:
    result = RUNNER.invoke(app, ["info"])
    assert result.exit_code == 0
    assert vsa.__version__ in result.output
    assert all(name in result.output for name in BACKENDS)
    assert "compiled part" in result.output and "auto takes" in result.output
    assert "no: it needs a CUDA device of compute capability 9.0" in result.output


def test_bench_measures_draws_and_writes(tmp_path: Path) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--topk", "1", "--topk", "0.5", "--json", str(figures), "--plot", str(picture)]
    result = RUNNER.invoke(app, ["bench", *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["direction"], row["kept"]) for row in rows] == [
        ("forward", 1),
        ("forward+backward", 1),
        ("forward", 2),
        ("forward+backward", 2),
    ]
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 and row["memory"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in result.output and "torch" in result.output
    worst = max(error for row in rows for error in row["errors"].values())
    assert f"Sampled tiles lie within {worst:.1e} of fp64." in result.output and worst > 0
    assert set(rows[0]["errors"]) == {"out", "lse"}
    assert set(rows[1]["errors"]) == {"out", "lse", "dq", "dk", "dv"}


def test_an_interrupted_bench_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure_one, figures, seen = Case.measure, tmp_path / "bench.json", []

    def measuring(self: Case, *arguments: Any) -> Any:
        if figures.is_file():
            seen.append(json.loads(figures.read_text()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measure_one(self, *arguments)

    monkeypatch.setattr(Case, "measure", measuring)
    arguments = ["--topk", "1", "--topk", "0.5", "--topk", "1.0", "--json", str(figures)]
    result = RUNNER.invoke(app, ["bench", *SMALL, *arguments])
    assert result.exit_code == 130
    assert "interrupted after 2 of 6 rows" in result.output
    assert [(len(each["rows"]), each["complete"]) for each in seen] == [
        (n, False) for n in (0, 1, 2)
    ]
    written = json.loads(figures.read_text())
    assert written == seen[-1] and [row["kept"] for row in written["rows"]] == [1, 1]
    assert result.output.count("4x8x8, 1 of 4 tiles, forward+backward: dense") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_killed_bench_leaves_whole_rows(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    many = [x for _ in range(60) for x in ("--topk", "0.5")]
    command = [sys.executable, "-m", "vsa", "bench", *SMALL, *many, "--json", str(figures)]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline().count("dense") == 0:  # until the first row is printed
            assert process.poll() is None
        process.stdout.readline()  # the second comes after the first was written
        process.kill()
    written = json.loads(figures.read_text())
    assert len(written["rows"]) >= 1 and not written["complete"]
    assert written["rows"][0]["direction"] == "forward"


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


def test_bench_does_not_time_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = vsa.attention

    def wrong(*args: Any, **options: Any) -> Any:
        out, *more = right(*args, **options)
        return 1.001 * out, *more

    monkeypatch.setattr(vsa, "attention", wrong)
    figures = tmp_path / "bench.json"
    result = RUNNER.invoke(app, ["bench", *SMALL, "--topk", "0.5", "--json", str(figures)])
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "topk 0.5, torch: wrong results, so not timed: out by 0.001 (at most 0.0001)" in said
    assert json.loads(figures.read_text())["rows"] == []


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


@pytest.mark.parametrize("kind", ["random", "correlated", "captured"])
def test_bench_takes_patterns_that_attention_did_not_choose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    grid, file = vsa.Grid((4, 8, 16)), tmp_path / "made.pt"
    patterns.save(
        file, {}, {"4x8x16": patterns.selection("random", grid, 2, 3, torch.device("cpu"))}
    )
    given = str(file) if kind == "captured" else kind
    used = []
    right = vsa.attention

    def noting(*args: Any, **options: Any) -> Any:
        used.append(options["selection"])
        return right(*args, **options)

    monkeypatch.setattr(vsa, "attention", noting)
    arguments = ["--grid", "4,8,16", "--heads", "1", "--topk", "3", *SMALL[4:]]
    arguments += ["--patterns", given]
    figures = tmp_path / "bench.json"
    result = RUNNER.invoke(app, ["bench", *arguments, "--json", str(figures)])
    assert result.exit_code == 0, result.output
    name = "made.pt" if kind == "captured" else kind
    said = " ".join(result.output.split())
    assert f"3 of 8 tiles kept (37.5%), sparsity pattern {name}" in said
    assert {row["pattern"] for row in json.loads(figures.read_text())["rows"]} == {name}
    wanted = patterns.selection(kind, grid, 1, 3, torch.device("cpu"), file)
    assert len(used) > 2 and all(torch.equal(x.mask(), wanted.mask()) for x in used)


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


def test_calls_in_a_row_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(function: Any, device: torch.device, calls: int) -> float:
        asked.append(calls)
        return 0.001 if len(asked) > 1 else 0.01  # the first waits for its kernels to be loaded

    monkeypatch.setattr(timing, "_timed", timed)
    assert timing.settled(lambda: None, torch.device("cuda")) == round(timing.TIMED / 0.001)
    assert asked[0] == 1 and 0.01 + 0.001 * sum(asked[1:]) >= timing.SETTLING
    assert timing.settled(lambda: None, torch.device("cpu")) == 1


def test_what_the_gpu_did_stands_below_the_time() -> None:
    assert time_and_rate(0.0015, 0.01, 500.0, {"clock": 1700.0, "power": 699.6}) == (
        "1.5 ms ±1%\n500 TFLOP/s\n1700 MHz, 700 W"
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--grid", "4,8"], "grid"),
        (["--grid", "4,8,0"], "grid"),
        (["--topk", "0"], "topk"),
        (["--topk", "1.5"], "topk"),
        (["--topk", "many"], "but it is 'many'"),
        (["--grid", "4,8,x"], "but it is '4,8,x'"),
        (["--tile", "5,5,5"], "tile"),
        (["--dtype", "fp8"], "dtype"),
        (["--device", "cuda:99"], "device"),
        (["--device", "toaster"], "device"),
        (["--backend", "hopper"], "backend"),
        (["--backend", "fastest"], "backend"),
        (["--json", "/nowhere/at/all.json"], "json"),
        (["--plot", "picture.gif"], "plot"),
        (["--shape", "wan"], "shape"),
        (["--sweep", "length"], "sweep"),
        (["--patterns", "captured"], "patterns"),
        (["--patterns", __file__], "patterns"),
        (["--lists", "captured"], "lists"),
        (["--read", "/nowhere/at/all.json"], "read"),
        (["--read", __file__], "--plot must name the picture"),
        (["--sweep", "density", "--topk", "1"], "sweep"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_options_are_named_before_any_work(arguments: list[str], name: str) -> None:
    result = RUNNER.invoke(app, ["bench", *SMALL, *arguments])
    assert result.exit_code == 2
    assert name in result.output
    assert "Traceback" not in result.output


def test_bench_takes_the_heads_and_text_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shapes.Shape(vsa.Grid((4, 4, 8), prefix=3), 2, 16)
    monkeypatch.setitem(shapes.SHAPES, "cogvideox-2b", small)
    arguments = ["--shape", "cogvideox-2b", "--repeats", "1", "--device", "cpu", "--forward-only"]
    result = RUNNER.invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    assert "128 + 3 tokens = cogvideox-2b, 2 heads of 16" in result.output


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


def test_lengths_double_and_sweeps_have_whole_tiles() -> None:
    assert [grid.tokens >> 10 for grid in shapes.LENGTHS] == [8, 16, 32, 64, 128]
    assert not any(grid.is_ragged for grid in shapes.LENGTHS)
    assert all(shape.head_dim in (64, 128) for shape in shapes.SHAPES.values())
