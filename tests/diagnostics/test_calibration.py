# SPDX-License-Identifier: Apache-2.0
"""Recall at every budget, and what ``vsa.calibrate`` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa
from vsa.diagnostics import Curves, watch
from vsa.diagnostics.curves import recall_by_count
from vsa.diagnostics.dense import tile_mass
from vsa.diagnostics.record import Record

GRID = vsa.Grid((5, 6, 7), tile=(2, 3, 4))
TEXT = vsa.Grid((5, 6, 7), tile=(2, 3, 4), prefix=5, suffix=9)


def random(grid: vsa.Grid, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    q = torch.randn(2, grid.length, heads, 16)
    return 3 * q, torch.randn(2, grid.length, kv_heads, 16)


def one_diffuse_head(grid: vsa.Grid, heads: int = 8) -> tuple[Tensor, Tensor]:
    """q and k of heads that look at a few tiles each, and of one that looks at all of them."""
    tile = grid.tile_of_token()
    codes = nn.functional.one_hot(tile, grid.num_tiles).float()
    q = torch.stack([codes * 40 * (head > 0) for head in range(heads)], 1)[None]
    k = codes[:, None].expand(-1, heads, -1)[None].contiguous()
    return q + 0.01 * torch.randn_like(q), k + 0.01 * torch.randn_like(k)


class Model(nn.Module):
    """Two layers, the first of which sees a rotary embedding."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.first = vsa.nn.VideoSparseAttention(32, heads, 0.25, tile=(2, 3, 4))
        self.second = vsa.nn.VideoSparseAttention(32, 2, 0.25, kv_heads=1, tile=(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, rotary=lambda q, k: (q.flip(-1) * 4, k))
        return self.second(x, grid=None)


@pytest.mark.parametrize("score", ["mean", *map(vsa.SubBlocks, (1, 4, 7, 16))], ids=str)
@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "text"])
def test_curves_are_the_recall_of_selections(grid: vsa.Grid, score: Any) -> None:
    q, k = random(grid)
    whole = (GRID.sizes == 24).nonzero()[:, 0]
    mass = tile_mass(q, k, grid)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))
    curve = recall_by_count(q, k, grid, tiles=99, score=score)
    for count in (1, 3, 7, GRID.num_tiles):
        selection = vsa.select(q, k, count, grid=grid, score=score)
        expected = vsa.diagnostics.sampled_recall(selection, q, k, tiles=99)
        torch.testing.assert_close(curve[..., count - 1], expected, rtol=1e-4, atol=1e-5)
        kept = (mass * selection.mask()).sum(-1)[:, :, whole].mean(-1)
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_equal_scores_go_to_the_lowest_tile_as_in_select() -> None:
    grid = vsa.Grid((4, 8, 8))
    spread = torch.randn(grid.num_tiles, 32, 8)[grid.tile_of_token(), 0]
    sign = 1 - 2 * (torch.arange(grid.tokens) % 2)  # pairs of neighbours cancel exactly
    pair = spread[torch.arange(grid.tokens) // 2 * 2]
    k = (1 + pair * sign[:, None])[None, :, None]
    q = torch.ones_like(k)
    curve = recall_by_count(q, k, grid)
    assert curve[0, 0].diff().unique().numel() > 1  # tiles hold different shares
    for count in (1, 2, 3):
        kept = vsa.select(q, k, count, grid=grid)
        assert (kept.mask()[..., :count]).all()
        expected = (tile_mass(q, k, grid) * kept.mask()).sum(-1).mean(-1)
        torch.testing.assert_close(curve[..., count - 1], expected)


def test_no_score_keeps_more_than_the_oracle() -> None:
    q, k = random(GRID)
    best = recall_by_count(q, k, GRID, score="oracle")
    for score in ("mean", vsa.SubBlocks(4)):
        found = recall_by_count(q, k, GRID, score=score)  # type: ignore[arg-type]
        assert (best - found).min() > -1e-6 and (best - found).max() > 0.01


def test_budgets_say_the_score_that_they_were_found_by() -> None:
    model, x = Model(), torch.randn(1, 5, 6, 7, 32)
    found = vsa.calibrate(model, 4, run=lambda: model(x), score=vsa.SubBlocks(2), aim="worst")
    assert isinstance(found, vsa.Budgets) and found.score == "SubBlocks(n=2)"
    assert found.total == 24


def test_all_query_tiles_and_slices_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random(GRID)
    whole = tile_mass(q.double(), k.double(), GRID)
    video = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / 4
    shares = video.softmax(-1)
    tile = GRID.tile_of_token()
    for i, j in ((0, 0), (3, 7), (GRID.num_tiles - 1, GRID.num_tiles - 1)):
        expected = shares[:, :, tile == i][..., tile == j].sum(-1).mean(-1)
        torch.testing.assert_close(whole[:, :, i, j], expected)
    monkeypatch.setattr("vsa.diagnostics.dense.SLICE_BYTES", 1)
    assert torch.equal(tile_mass(q.double(), k.double(), GRID), whole)


def test_calls_of_a_step_are_averaged_and_steps_told_apart() -> None:
    curves = Curves(["a", "b"], tiles=99)
    parts = [random(GRID) for _ in range(3)]
    for (q, k), step in zip(parts, (0, 0, 4), strict=True):
        curves.note("a", q, k, grid=GRID, step=step)
    each = [recall_by_count(q, k, GRID, tiles=99).mean(0).double() for q, k in parts]
    each = [curve / curve[:, -1:] for curve in each]
    assert curves.steps == [0, 4] and curves.noted() == ["a"]
    torch.testing.assert_close(curves.of("a", [4]), each[2])
    torch.testing.assert_close(curves.of("a", [0]), (each[0] + each[1]) / 2)
    torch.testing.assert_close(curves.of("a"), ((each[0] + each[1]) / 2 + each[2]) / 2)


def test_autocast_does_not_round_what_is_measured() -> None:
    q, k = (x.bfloat16() for x in random(GRID))
    plain, cast = Curves(["a"]), Curves(["a"])
    plain.note("a", q, k, grid=GRID)
    with torch.autocast("cpu", torch.bfloat16):
        cast.note("a", q, k, grid=GRID)
    assert torch.equal(plain.of("a"), cast.of("a"))


def test_a_diffuse_head_gets_what_sharp_heads_can_spare() -> None:
    grid = vsa.Grid((8, 8, 16))
    q, k = one_diffuse_head(grid)
    curves = Curves(["layer"])
    curves.note("layer", q, k, grid=grid)
    budgets = vsa.calibrate(curves, 0.25, aim="worst")
    assert isinstance(budgets, vsa.Budgets)
    counts = budgets.layers["layer"].counts
    assert budgets.total == sum(counts) == 8 * 4 and budgets.uniform == 4
    assert 1 <= min(counts) < 3 and counts[0] == max(counts) > 2 * 4
    floor = vsa.calibrate(curves, 0.25, least=3, aim="worst")
    assert isinstance(floor, vsa.Budgets) and min(floor.of("layer").counts) == 3
    assert floor.total == budgets.total
    mean = vsa.calibrate(curves, 0.25, aim="mean")
    assert isinstance(mean, vsa.Budgets) and mean.total == budgets.total
    assert mean.recall is not None and budgets.recall is not None
    sums = [sum(x["layer"]) for x in (mean.recall, budgets.recall, budgets.recall_uniform or {})]
    assert sums[0] == max(sums) and min(mean.recall["layer"]) <= min(budgets.recall["layer"])
    # and so it is where it is spent
    uniform, calibrated = (
        vsa.select(q, k, topk, grid=grid).recall(q, k)[0] for topk in (4, budgets.of("layer"))
    )
    assert uniform.min() < 0.35 and calibrated.min() > 1.8 * uniform.min()
    assert budgets.recall is not None and budgets.recall_uniform is not None
    torch.testing.assert_close(torch.tensor(budgets.recall["layer"]), calibrated, atol=0.02, rtol=0)
    torch.testing.assert_close(
        torch.tensor(budgets.recall_uniform["layer"]), uniform, atol=0.02, rtol=0
    )


def test_a_model_is_watched_as_it_attends() -> None:
    model, x = Model(), torch.randn(2, 5, 6, 7, 32)
    told: list[tuple[Tensor, Tensor]] = []

    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        told.append((q, k))
        return q, k

    with torch.no_grad(), watch(model, tiles=99) as curves:
        before = model(x)
        model(x)
        model.first(x, rotary=rotary)
    torch.testing.assert_close(before, model(x))  # and nothing is left behind
    assert not model.first._forward_pre_hooks
    assert curves.layers == ["first", "second"] and curves.steps == [0, 1, 2]
    q, k = (y.flatten(1, 3) for y in told[-1])
    expected = recall_by_count(q, k, GRID, tiles=99).mean(0).double()
    torch.testing.assert_close(curves.of("first", [2]), expected / expected[:, -1:])
    assert not torch.equal(curves.of("first", [0]), curves.of("first", [2]))  # rotary took part


def test_a_compiled_model_has_the_same_names() -> None:
    model, x = Model(), torch.randn(1, 5, 6, 7, 32)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found = vsa.calibrate(compiled, 4, run=lambda: compiled(x), aim="worst")
        assert isinstance(found, vsa.Budgets) and list(found.layers) == ["first", "second"]
        found.apply_to(compiled)
        assert model.first.topk is found.layers["first"]
        torch.testing.assert_close(compiled(x), model(x))


def test_each_step_may_have_its_own_budgets_at_the_same_total() -> None:
    grid = vsa.Grid((8, 8, 16))
    curves = Curves(["layer"])
    sharp, diffuse = one_diffuse_head(grid), random(grid, 8, 8)
    curves.note("layer", sharp[0], sharp[1], grid=grid, step=2)
    curves.note("layer", diffuse[0] / 9, diffuse[1], grid=grid, step=6)
    found = vsa.calibrate(curves, 0.25, per_step=True, aim="worst")
    assert isinstance(found, vsa.StepSchedule) and list(found.steps) == [0, 6]
    first, second = found.at(3), found.at(99)
    assert isinstance(first, vsa.Budgets) and isinstance(second, vsa.Budgets)
    assert first.total + second.total == 2 * 8 * 4 and second.total > first.total


def test_a_schedule_is_calibrated_part_by_part() -> None:
    grid = vsa.Grid((8, 8, 16))
    curves = Curves(["layer"])
    for step in (1, 2, 5):
        q, k = random(grid, 4, 4) if step == 5 else one_diffuse_head(grid, 4)
        curves.note("layer", q, k, grid=grid, step=step)
    found = vsa.calibrate(curves, vsa.StepSchedule({0: None, 1: 0.5, 4: 0.25}), aim="worst")
    assert isinstance(found, vsa.StepSchedule)
    dense, wide, narrow = (found.at(step) for step in (0, 3, 4))
    assert dense is None
    assert isinstance(wide, vsa.Budgets) and isinstance(narrow, vsa.Budgets)
    assert (wide.total, narrow.total) == (4 * 8, 4 * 4)
    early, late = Curves(["layer"]), Curves(["layer"])
    for name in ("_sums", "_errors"):
        noted = getattr(curves, name).items()
        setattr(early, name, {key: value for key, value in noted if key[1] < 4})
        setattr(late, name, {key: value for key, value in noted if key[1] >= 4})
    early.grid = late.grid = grid
    for part, topk, own in ((early, 0.5, wide), (late, 0.25, narrow)):
        alone = vsa.calibrate(part, topk, aim="worst")
        assert isinstance(alone, vsa.Budgets) and alone.layers == own.layers
    with pytest.raises(ValueError, match="source must have noted a step from 9 on"):
        vsa.calibrate(curves, vsa.StepSchedule({0: 0.5, 9: 0.25}), aim="worst")
    with pytest.raises(TypeError, match="topk must be a schedule of numbers"):
        vsa.calibrate(curves, vsa.StepSchedule({0: vsa.TopP(0.5)}), aim="worst")


def test_files_hold_everything_and_are_checked(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(1, 5, 6, 7, 32)
    found = vsa.calibrate(model, 4, run=lambda: model(x), aim="worst")
    assert isinstance(found, vsa.Budgets)
    file = tmp_path / "budgets.json"
    found.save(file)
    again = vsa.Budgets.load(file)
    assert again.as_json() == found.as_json() == json.loads(file.read_text())
    assert (again.grid, again.tile, again.score) == ((5, 6, 7), (2, 3, 4), "mean")
    assert str(again) == str(found)
    table = str(found).splitlines()
    assert table[0].startswith("24 tiles for 6 heads of 2 layers: 33.3% of 12, grid 5x6x7")
    assert [line.split()[0] for line in table[1:]] == ["layer", "first", "second", "all"]
    schedule = vsa.StepSchedule({0: None, 3: found, 5: 0.1, 6: vsa.TopP(0.5, 2), 7: (1, 0.5)})
    schedule.save(file)
    loaded = vsa.StepSchedule.load(file)
    assert repr(loaded) == repr(schedule) and loaded(1, 4).layers == found.layers  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"budgets of vsa.calibrate, but its format is 'vsa step"):
        vsa.Budgets.load(file)
    for change in ({"total": 25}, {"layers": []}, {"num_tiles": 3}, {"layers": [{"name": "a"}]}):
        file.write_text(json.dumps(found.as_json() | change))
        with pytest.raises(ValueError, match=r"budgets.json must hold budgets of vsa.calibrate"):
            vsa.Budgets.load(file)
    for text in ("[]", "{}", "no json"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"budgets.json must"):
            vsa.Budgets.load(file)
        with pytest.raises(ValueError, match=r"budgets.json must"):
            vsa.StepSchedule.load(file)


def test_budgets_for_another_model_are_refused_and_change_nothing() -> None:
    model, x = Model(), torch.randn(1, 5, 6, 7, 32)
    found = vsa.calibrate(model, 4, run=lambda: model(x), aim="worst")
    assert isinstance(found, vsa.Budgets)
    with pytest.raises(ValueError, match="one number per query head, but they have 4 for the 8"):
        found.apply_to(other := Model(heads=8))
    assert other.first.topk == other.second.topk == 0.25
    with pytest.raises(ValueError, match=r"layers of this model, '0', but one is for 'first'"):
        found.apply_to(nn.Sequential(model.first))
    with pytest.raises(ValueError, match="must name the layer 'second', but they name 'first'"):
        vsa.Budgets({"first": found.of("first")}).apply_to(model)
    with pytest.raises(ValueError, match=r"model must hold a vsa.nn.VideoSparseAttention"):
        found.apply_to(nn.Linear(1, 1))
    found.apply_to(model)
    with pytest.raises(ValueError, match="topk was found for a grid of 12 key tiles, but this one"):
        model(torch.randn(1, 5, 6, 9, 32))


def bad_calls() -> list[tuple[str, Any, dict[str, Any]]]:
    curves = Curves(["a"])
    curves.note("a", *random(GRID), grid=GRID)
    broken = Curves(["a"])
    broken.note("a", *(x * float("nan") for x in random(GRID)), grid=GRID)
    model = Model()
    return [
        ("source has noted nothing", Curves(["a"]), {}),
        ("source is a record without curves", Record(2), {}),
        ("source must be a model, a record", 3, {}),
        ("run must be a function", model, {}),
        ("run must be None where source", curves, {"run": print}),
        ("model must hold a vsa.nn", nn.Linear(1, 1), {"run": print}),
        ("least must not exceed topk", curves, {"topk": 2, "least": 3}),
        ("least as a float", curves, {"least": 1.5}),
        ("topk must be an int", curves, {"topk": "0.1"}),
        ("per_step must be False", curves, {"topk": vsa.StepSchedule({0: 1}), "per_step": True}),
        ("aim must be", curves, {"aim": "median"}),
        ("source must have noted layer 'a' with its values", curves, {"aim": "error"}),
        ("source must have noted finite numbers, but in layer 'a'", broken, {}),
        ("tiles must be at least 1", model, {"run": print, "tiles": 0}),
        ("score must be", model, {"run": print, "score": "median"}),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_bad_calls_of_calibrate(case: tuple[str, Any, dict[str, Any]]) -> None:
    sentence, source, options = case
    with pytest.raises((ValueError, TypeError), match=sentence):
        vsa.calibrate(source, **{"topk": 4, "aim": "worst"} | options)


def test_bad_notes() -> None:
    q, k = random(GRID)
    curves = Curves(["a", "b"])
    curves.note("a", q, k, grid=GRID)
    with pytest.raises(ValueError, match="layer must be one of"):
        curves.note("c", q, k, grid=GRID)
    with pytest.raises(ValueError, match=r"grid is \(5, 6, 7\) in tiles of \(1, 6, 7\)"):
        curves.note("b", q, k, grid=vsa.Grid((5, 6, 7), tile=(1, 6, 7)))
    with pytest.raises(ValueError, match="k has 209 tokens"):
        curves.note("b", q, k[:, 1:], grid=GRID)
    with pytest.raises(ValueError, match="q must have 4 heads as before, but it has 2"):
        curves.note("a", q[:, :, :2], k, grid=GRID)
    with pytest.raises(ValueError, match="nothing was noted of layer 'b'"):
        curves.of("b")
    with pytest.raises(ValueError, match="layers must have names of their own"):
        Curves(["a", "a"])
