# SPDX-License-Identifier: Apache-2.0
"""``vsa.calibrate(aim="error")``: budgets of a layer's heads by the error of its output."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vsa
from vsa import calibration
from vsa.diagnostics import Curves

GRID = vsa.Grid((5, 6, 7), tile=(2, 3, 4))


def model_of_two() -> nn.Sequential:
    """Two layers on 12 tiles, of four heads and of two."""
    return nn.Sequential(
        vsa.nn.VideoSparseAttention(32, 4, 0.25, tile=(2, 3, 4)),
        vsa.nn.VideoSparseAttention(32, 2, 0.25, kv_heads=1, tile=(2, 3, 4)),
    )


def spread_and_sharp(grid: vsa.Grid) -> list[Tensor]:
    """A head that looks at all tiles and finds little, and three that look at some and find much.

    q, k and v.
    """
    codes = nn.functional.one_hot(grid.tile_of_token(), grid.num_tiles).double()
    q = torch.stack([codes * 8 * (head > 0) for head in range(4)], 1)[None]
    q += 0.01 * torch.randn_like(q)
    k = codes[:, None].expand(-1, 4, -1)[None] + 0.01 * torch.randn_like(q)
    v = torch.randn(1, grid.tokens, 4, 16, dtype=torch.float64)
    v[:, :, 0] *= 0.1
    return [q, k, v]  # sharp, but not on one tile alone


def test_spread_heads_take_no_tiles_from_sharp_ones_where_the_error_counts() -> None:
    grid = vsa.Grid((8, 8, 16))
    q, k, v = spread_and_sharp(grid)
    curves = Curves(["layer"])
    curves.note("layer", q, k, v, grid=grid)
    worst, error = (vsa.calibrate(curves, 0.25, aim=aim) for aim in ("worst", "error"))
    assert isinstance(worst, vsa.Budgets) and isinstance(error, vsa.Budgets)
    assert worst.total == error.total == 4 * 4
    assert worst.of("layer").counts[0] > 4 > max(worst.of("layer").counts[1:])
    assert error.of("layer").counts[0] < 4 <= min(error.of("layer").counts[1:])
    # and so it is in what attention puts out, whose error is the one that budgets tell
    dense = vsa.attention(q, k, v, 1.0, grid=grid)
    off = {}
    for name, topk in (("uniform", 4), ("worst", worst.of("layer")), ("error", error.of("layer"))):
        away = vsa.attention(q, k, v, topk, grid=grid) - dense
        off[name] = float(away.square().sum() / dense.square().sum())
    assert off["error"] < 0.9 * off["uniform"] < 0.9 * off["worst"]
    told = {"error": error.error, "uniform": error.error_uniform, "worst": worst.error}
    for name, errors in told.items():
        assert errors is not None
        assert sum(errors["layer"]) == pytest.approx(off[name], rel=0.2)  # 16 of the query tiles


def test_no_other_budgets_of_a_layer_have_a_smaller_error() -> None:
    grid = vsa.Grid((2, 6, 4), tile=(2, 3, 1))  # 8 tiles
    names = ["a", "b"]
    curves, rows = Curves(names, tiles=99), []
    for unit, name in enumerate(names, start=1):
        q, k, v = (torch.randn(1, grid.tokens, 3, 8, dtype=torch.float64) for _ in range(3))
        v[:, :, 0] *= 3
        curves.note(name, 2 * unit * q, k, 10**unit * v, grid=grid)
        dense = vsa.attention(2 * unit * q, k, v, 1.0, grid=grid)
        outs = [vsa.attention(2 * unit * q, k, v, n, grid=grid) for n in range(1, 9)]
        errors = [(out - dense).square().sum((0, 1, 3)) / dense.square().sum() for out in outs]
        rows.append(torch.stack(errors, 1))
    for count in (1, 2, 5, 8):
        found = vsa.calibrate(curves, count, aim="error")
        assert isinstance(found, vsa.Budgets) and found.error is not None
        others = torch.tensor(list(product(range(1, 9), repeat=3)))
        others = others[others.sum(1) == count * 3]
        for name, each in zip(names, rows, strict=True):
            counts = torch.tensor(found.of(name).counts)
            assert int(counts.sum()) == count * 3  # tiles stay in their layer
            best = each[torch.arange(3), others - 1].sum(1).min()
            reached = each[torch.arange(3), counts - 1].sum()
            torch.testing.assert_close(reached, best, rtol=1e-9, atol=1e-15)
            assert sum(found.error[name]) == pytest.approx(float(best), abs=1e-12)
        again = vsa.calibrate(curves, count, aim="error")
        assert isinstance(again, vsa.Budgets) and again.as_json() == found.as_json()


def test_budgets_for_the_error_are_never_worse_than_even_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curves = Curves(["a"])
    q, k, v = (torch.randn(1, GRID.tokens, heads, 16) for heads in (4, 2, 2))
    curves.note("a", q, k, v, grid=GRID)
    found = vsa.calibrate(curves, 4, aim="error")
    monkeypatch.setitem(calibration.FILL, "error", lambda *_: torch.tensor([1, 1, 2, 12]))
    even = vsa.calibrate(curves, 4, aim="error")
    assert isinstance(found, vsa.Budgets) and isinstance(even, vsa.Budgets)
    assert even.of("a").counts == (4, 4, 4, 4)
    assert even.error == even.error_uniform == found.error_uniform
    assert found.error is not None and even.error is not None
    assert sum(found.error["a"]) <= sum(even.error["a"])


def test_a_model_is_calibrated_for_its_error_and_the_file_says_so(tmp_path: Path) -> None:
    model, x = model_of_two(), torch.randn(1, 5, 6, 7, 32)
    found = vsa.calibrate(model, 4, run=lambda: model(x), aim="error")
    assert isinstance(found, vsa.Budgets) and found.aim == "error" and found.total == 24
    found.save(file := tmp_path / "budgets.json")
    again = vsa.Budgets.load(file)
    assert again.as_json() == found.as_json() == json.loads(file.read_text())
    assert (again.aim, again.error, again.error_uniform) == (
        "error",
        found.error,
        found.error_uniform,
    )
    table = str(found).splitlines()
    assert str(again) == str(found) and table[0].endswith("aim error")
    assert "output error  if uniform" in table[1]
    assert found.error is not None and found.error_uniform is not None
    sums = [sum(map(sum, each.values())) for each in (found.error, found.error_uniform)]
    assert sums[0] <= sums[1]
    assert table[-1].split()[-2:] == [f"{(each / 2) ** 0.5:.3f}" for each in sums]
    steps = vsa.calibrate(model, 4, run=lambda: (model(x), model(-x)), aim="error", per_step=True)
    assert isinstance(steps, vsa.StepSchedule) and list(steps.steps) == [0, 1]
    before = found.as_json()  # as 0.2.0 wrote it first
    del before["aim"]
    for layer in before["layers"]:
        del layer["error"], layer["error_uniform"]
    file.write_text(json.dumps(before))
    old = vsa.Budgets.load(file)
    assert old.layers == found.layers and old.aim is None and old.error is None
    assert "output error" not in str(old)
