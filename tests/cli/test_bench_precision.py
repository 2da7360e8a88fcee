# SPDX-License-Identifier: Apache-2.0
"""vsa bench --precision: native beside it, errors in the row, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.cli.bench.measurement import Measurement

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
SMALL = ["--grid", "4,8,16", "--topk", "2", "--heads", "1", "--head-dim", "64", "--repeats", "1"]
SMALL += ["--device", "cpu", "--dtype", "bf16"]


def invoke(*more: str) -> Any:
    return RUNNER.invoke(app, ["bench", *SMALL, *more])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_native_stands_beside_it(precision: str, tmp_path: Path) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = invoke("--precision", precision, "--json", str(figures), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    about = json.loads(figures.read_text())
    assert about["precision"] == precision and about["dtype"] == "bfloat16"
    (row,) = about["rows"]  # forward alone
    assert row["direction"] == "forward" and row["precision"] == precision
    low, native = row["errors"]["out"], row["native"]["errors"]["out"]
    assert 0.01 < low < 0.07 and 0 < native < 0.005
    assert row["native"]["ms"] > 0 and row["dense_ms"] > 0 and row["sparse_ms"] > 0
    back = Measurement.of_row(row)
    assert back.native is not None and back.row() == row
    assert back.native_tflops == pytest.approx(
        back.sparse_tflops * row["sparse_ms"] / row["native"]["ms"]
    )
    assert f"relative error {low:.4f} for {native:.4f}" in result.output
    for words in ("native", f"error {low:.4f}", f"{precision} beside native"):
        assert words in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_files_of_before_and_of_native_have_no_such_column(tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    result = invoke("--forward-only", "--json", str(figures))
    assert result.exit_code == 0, result.output
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["native"] is None and row["precision"] == "native"
    del row["native"], row["precision"]
    assert Measurement.of_row(row).native is None
    with pytest.raises(ValueError, match="rows must be those of vsa bench"):
        Measurement.of_row(row | {"native": {"seconds": 1.0}})


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vsa.attention

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        if options.get("return_lse") and options["precision"] == "int8":
            return 1.05 * found[0], *found[1:]
        return found

    monkeypatch.setattr(vsa, "attention", wrong)
    result = invoke("--precision", "int8")
    assert result.exit_code == 1
    assert "torch int8: wrong results, so not timed: out by" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--precision", "int4"], 'precision must be "native", "int8" or "fp8"'),
        (["--precision", "int8", "--dtype", "fp32"], "int8 takes bf16 or fp16 and a head_dim of"),
        (["--precision", "fp8", "--head-dim", "32"], "the type is bfloat16 and the head_dim 32"),
        (["--precision", "fp8", "--tail"], "fp8 has no tail: leave it out"),
        (["--precision", "fp8", "--backend", "flex"], "backend 'flex' cannot run here"),
    ],
)
def test_what_it_cannot_do_is_said_before_work(more: list[str], sentence: str) -> None:
    result = invoke(*more)
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and sentence in words
