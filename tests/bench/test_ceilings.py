# SPDX-License-Identifier: Apache-2.0
"""bench/ceilings.py: what it makes of the program's lines, and that the program compiles."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
# Made up: no number here was measured.
LINE = '{"probe": "loads", "d": 128, "by": "TMA", "users": 1, "footprint": 16.0, "bytes": 8e9, '
LINE += '"flops": 5e11, "ms": 1.0, "spread": 0.01, "clocks": 1000000, "blocks": 100}'


@pytest.fixture(scope="module")
def ceilings():
    spec = importlib.util.spec_from_file_location("vsa_test_ceilings", BENCH / "ceilings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
    path.chmod(0o755)
    return path


def test_rates_are_per_second_and_per_clock(ceilings, tmp_path: Path) -> None:
    (row,) = ceilings.run(program(tmp_path / "good", f"print({LINE!r})"), "loads")
    assert row["TB/s"] == pytest.approx(8) and row["B/clk/SM"] == pytest.approx(80)
    assert row["TFLOP/s"] == pytest.approx(500) and row["GHz"] == pytest.approx(1)
    assert "d 128, TMA, 16 MB, used once" in ceilings.table([row])


def test_a_product_has_clocks_and_exponentials_have_a_rate(ceilings) -> None:
    row = {"ms": 1.0, "clocks": 3200, "blocks": 2, "count": 100}
    assert ceilings.with_rates(row | {"probe": "wgmma"})["clk/product"] == 32
    assert ceilings.with_rates(row | {"probe": "exp2"})["exp2/clk/SM"] == 100 / 3200


def test_a_loop_has_clocks_per_tile_and_energy_where_nvml_says(ceilings) -> None:
    row = {"probe": "loops", "ms": 1.0, "spread": 0.01, "clocks": 6000, "blocks": 2, "count": 10}
    row |= {"d": 128, "consumers": 3, "tiles": 1, "behind": "output", "q": "shared", "turns": 0}
    row |= {"flops": 8e8, "sustained_ms": 2.0}
    first = ceilings.with_rates(row | {"loads": "none", "joules": 4e-4})
    last = ceilings.with_rates(row | {"loads": "random", "turns": 1, "joules": -1})
    assert first["clk/tile"] == 600 and "clk/product" not in first
    assert first["TFLOP/s long"] == pytest.approx(0.4) and first["pJ/FLOP"] == pytest.approx(0.5)
    assert "pJ/FLOP" not in last
    said = ceilings.table([first, last])
    assert "d 128, 3 of Q in shared, 1 per softmax, output behind   " in said
    assert "d 128, 3 of Q in shared, 1 per softmax, output behind, in turns, random loads" in said


def test_a_pair_has_its_loads_and_its_addition(ceilings) -> None:
    row = {"probe": "both", "ms": 1.0, "spread": 0.01, "clocks": 6000, "blocks": 2, "count": 10}
    row = ceilings.with_rates(row | {"d": 64, "footprint": 4.2, "bytes": 1.2e6})
    assert row["clk/pair"] == 600 and row["B/clk/SM"] == 100 and "clk/product" not in row
    assert "d 64, from 4 MB into 8 MB" in ceilings.table([row])


def test_a_loop_of_a_backward_has_clocks_per_pair(ceilings) -> None:
    row = {"probe": "backward", "ms": 1.0, "spread": 0.01, "clocks": 6000, "blocks": 2, "count": 10}
    row |= {"d": 128, "loop": "pass over keys", "worst": 0.001, "flops": 2.4e8}
    rows = [ceilings.with_rates(row | {"loads": loads}) for loads in (0, 1)]
    assert rows[0]["clk/pair"] == 600 and rows[0]["FLOP/clk/SM"] == 20000
    said = ceilings.table(rows)
    assert "d 128, pass over keys   " in said and "d 128, pass over keys, loads" in said


def test_a_program_that_stops_keeps_the_rows_before(ceilings, tmp_path: Path) -> None:
    script = f"print({LINE!r}); print('{{half'); sys.exit('a kernel failed: trap')"
    good, bad = ceilings.run(program(tmp_path / "trap", script), "loads")
    assert good["TB/s"] == pytest.approx(8) and bad["error"] == "a kernel failed: trap"
    assert "failed: a kernel failed: trap" in ceilings.table([good, bad])


def test_a_program_that_hangs_is_given_up(
    ceilings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "PATIENCE", 2)
    hang = tmp_path / "hang"
    # Not Python, whose start may take two seconds on a busy machine.
    hang.write_text(f"#!/bin/sh\necho '{LINE}'\nexec sleep 60\n")
    hang.chmod(0o755)
    good, bad = ceilings.run(hang, "loads")
    assert good["by"] == "TMA" and "more than 2 s" in bad["error"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_program_compiles_without_a_word(ceilings, tmp_path: Path) -> None:
    assert ceilings.compile_program("nvcc", tmp_path / "ceilings") == ""
    assert (tmp_path / "ceilings").is_file()
