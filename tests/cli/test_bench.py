# SPDX-License-Identifier: Apache-2.0
"""vsa bench: what it measures and refuses, and the sparsity patterns that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.cli.bench.case import Case
from vsa.cli.bench.measurement import Measurement
from vsa.cli.bench.table import line, tables
from vsa.measure import patterns, shapes, timing

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["--grid", "4,8,8", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--device", "cpu"]


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


def test_bench_with_a_tail_holds_it_to_fp64(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures, tails = tmp_path / "bench.json", set()
    right = vsa.attention

    def noting(*args: Any, **options: Any) -> Any:
        tails.add(options["tail"])
        return right(*args, **options)

    monkeypatch.setattr(vsa, "attention", noting)
    small = [*SMALL[2:], "--grid", "5,6,7", "--topk", "2", "--json", str(figures)]
    result = RUNNER.invoke(app, ["bench", *small, "--tail"])
    assert result.exit_code == 0, result.output
    rows = json.loads(figures.read_text())["rows"]
    assert tails == {True} and all(row["tail"] for row in rows)
    assert set(rows[1]["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    assert "with a tail" in result.output
    assert Measurement.of_row({k: v for k, v in rows[0].items() if k != "tail"}).tail is False

    def without(*args: Any, **options: Any) -> Any:
        return right(*args, **options | {"tail": False})

    monkeypatch.setattr(vsa, "attention", without)
    result = RUNNER.invoke(app, ["bench", *small, "--tail"])
    assert result.exit_code == 1 and "wrong results" in result.output


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


def test_calls_in_a_row_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(function: Any, device: torch.device, calls: int) -> float:
        asked.append(calls)
        return 0.001 if len(asked) > 1 else 0.01  # the first waits for its kernels to be loaded

    monkeypatch.setattr(timing, "_timed", timed)
    assert timing.settled(lambda: None, torch.device("cuda")) == round(timing.TIMED / 0.001)
    assert asked[0] == 1 and 0.01 + 0.001 * sum(asked[1:]) >= timing.SETTLING
    assert timing.settled(lambda: None, torch.device("cpu")) == 1


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
        (["--graph"], "CUDA graphs need a CUDA device, but --device is cpu"),
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


def measurement(**more: Any) -> Measurement:
    numbers = dict.fromkeys(("dense", "sparse", "dense_spread", "sparse_spread"), 0.002)
    numbers |= dict.fromkeys(("dense_tflops", "sparse_tflops", "memory", "inputs"), 3)
    return Measurement(
        "small", "chosen", (4, 8, 8), 0, 1, 16, "forward", kept=1, tiles=4, **numbers | more
    )


def test_host_time_and_other_ways_are_printed_and_read_again() -> None:
    host = {"dense": 3e-5, "sparse": 1.1e-4}
    row = measurement(host=host)
    assert line(row).endswith("1.00x, host 110 µs a call")
    assert not line(measurement()).endswith("call")  # on a CPU there is no such time
    assert len(list(tables([measurement()]))) == 1
    assert printed(list(tables([row]))[1]) == [["forward", "2.000 ms 30 µs", "2.000 ms 110 µs"]]
    row = measurement(host=host | {"compiled": 1e-4}, ways={"graph": 0.0012, "compiled": 0.0021})
    assert printed(list(tables([row]))[1])[0][3:] == ["1.200 ms", "2.100 ms 100 µs"]
    again = Measurement.of_row(row.row())
    assert again.host == pytest.approx(row.host) and again.ways == pytest.approx(row.ways)
    before = {name: x for name, x in row.row().items() if name not in ("host_ms", "ways_ms")}
    assert Measurement.of_row(before).host == {}  # files of earlier versions


def printed(table: Any) -> list[list[str]]:
    columns = [[" ".join(cell.split()) for cell in column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_and_compiled_beside_eager(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    arguments = ["--grid", "8,8,8", "--heads", "2", "--head-dim", "64", "--dtype", "bf16"]
    arguments += ["--repeats", "2", "--graph", "--json", str(figures)]
    result = RUNNER.invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    for row in json.loads(figures.read_text())["rows"]:
        assert set(row["ways_ms"]) == {"graph", "compiled"} and min(row["ways_ms"].values()) > 0
        assert set(row["host_ms"]) == {"dense", "sparse", "compiled"}


def test_lengths_double_and_sweeps_have_whole_tiles() -> None:
    assert [grid.tokens >> 10 for grid in shapes.LENGTHS] == [8, 16, 32, 64, 128]
    assert not any(grid.is_ragged for grid in shapes.LENGTHS)
    assert all(shape.head_dim in (64, 128) for shape in shapes.SHAPES.values())


def test_bench_chooses_by_another_score(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    arguments = ["--topk", "2", "--score", "sub-blocks:4", "--json", str(figures)]
    result = RUNNER.invoke(app, ["bench", *SMALL, *arguments, "--forward-only"])
    assert result.exit_code == 0, result.output
    assert json.loads(figures.read_text())["score"] == "SubBlocks(n=4)"
    assert "SubBlocks(n=4)" in result.output
    for wrong, words in (
        (["--score", "sub-blocks"], "a score must be mean or sub-blocks:N"),
        (["--score", "sub-blocks:99"], "n must be from 1 to 16"),
        (["--score", "sub-blocks:4", "--patterns", "random"], "leave --score out"),
    ):
        refused = RUNNER.invoke(app, ["bench", *SMALL, *wrong])
        assert refused.exit_code == 2 and words in " ".join(refused.output.split()), refused.output
