# SPDX-License-Identifier: Apache-2.0
"""Calibrated budgets and schedules of steps in transformers of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from integrations.tiny_transformers import FAMILIES, GRID, HEADS, run, wan

import vsa
from vsa.integrations.diffusers import apply_vsa, collect, remove_vsa

STEPS = (900.0, 800.0, 700.0, 600.0)


def at(inputs: dict[str, Any], timestep: float) -> dict[str, Any]:
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@torch.no_grad()
def test_every_family_is_calibrated_and_keeps_its_budgets(family: Any) -> None:
    model, inputs = family()
    inputs = at(inputs, 950.0)
    apply_vsa(model, topk=1.0, tile=(2, 3, 4))
    budgets = vsa.calibrate(model, 4, run=lambda: run(model, inputs), aim="worst")
    assert isinstance(budgets, vsa.Budgets)
    assert len(budgets.layers) == 2 and budgets.total == 2 * HEADS * 4
    assert (budgets.grid, budgets.tile, budgets.num_tiles) == (GRID, (2, 3, 4), 12)
    apply_vsa(model, topk=budgets, tile=(2, 3, 4))
    assert "topk=<vsa.Budgets of 16 tiles for 4 heads of 2 layers" in repr(model)
    with collect(model) as record:
        run(model, inputs)
    for layer, budget in enumerate(budgets.layers.values()):
        found = record.density[layer, 0] * 12
        torch.testing.assert_close(found, torch.tensor(budget.counts).float())
    by_name = dict(zip(range(2), budgets.layers, strict=True))
    expected = run(model, inputs)
    apply_vsa(model, topk=lambda layer, step: budgets.of(by_name[layer]), tile=(2, 3, 4))
    assert torch.equal(run(model, inputs), expected)


@torch.no_grad()
def test_dense_layers_need_no_budget_and_the_rest_do() -> None:
    model, inputs = wan()
    tile = (2, 3, 4)
    apply_vsa(model, topk=1.0, tile=tile, dense_layers=[0])
    budgets = vsa.calibrate(model, 4, run=lambda: run(model, inputs), aim="worst")
    assert isinstance(budgets, vsa.Budgets) and list(budgets.layers) == ["blocks.1"]
    apply_vsa(model, topk=budgets, tile=tile, dense_layers=[0])
    before = run(model, inputs)
    with pytest.raises(ValueError, match=r"must name the layer 'blocks.0', but they name"):
        apply_vsa(model, topk=budgets, tile=tile)
    with pytest.raises(ValueError, match=r"one number per query head, but they have 1 for the 2"):
        few = vsa.Budgets({"blocks.1": vsa.LayerBudget((4,), 12)})
        apply_vsa(model, topk=vsa.StepSchedule({0: None, 1: few}), tile=tile, dense_layers=[0])
    with pytest.raises(ValueError, match=r"layers of this model, .*, but one is for 'x'"):
        apply_vsa(model, topk=vsa.Budgets({"x": budgets.of("blocks.1")}), tile=tile)
    assert torch.equal(run(model, inputs), before)  # nothing was changed
    apply_vsa(model, topk=budgets, tile=(2, 2, 7), dense_layers=[0])  # 9 tiles
    with pytest.raises(ValueError, match=r"calibrated on \(5, 6, 7\) tokens in tiles of \(2, 3, 4"):
        run(model, inputs)
    apply_vsa(model, topk=budgets, tile=(3, 2, 4), dense_layers=[0])  # 12 tiles, but others
    with pytest.raises(ValueError, match=r"this video is \(5, 6, 7\) in tiles of \(3, 2, 4\)"):
        run(model, inputs)
    elsewhere = vsa.Budgets(budgets.layers)  # does not know its grid
    apply_vsa(model, topk=elsewhere, tile=(3, 2, 4), dense_layers=[0])
    run(model, inputs)
    apply_vsa(model, topk=elsewhere, tile=(2, 2, 7), dense_layers=[0])
    with pytest.raises(ValueError, match=r"topk was found for a grid of 12 key tiles, .* has 9"):
        run(model, inputs)


@torch.no_grad()
def test_a_schedule_spends_more_in_early_steps(tmp_path: Path) -> None:
    model, inputs = wan()
    tile = (2, 3, 4)
    apply_vsa(model, topk=1.0, tile=tile)
    with collect(model, tiles=4, curves=True) as record:
        for timestep in STEPS:
            run(model, at(inputs, timestep))
    schedule = vsa.calibrate(record, vsa.StepSchedule({0: None, 1: 0.5, 3: 0.25}), aim="worst")
    assert isinstance(schedule, vsa.StepSchedule)
    schedule.save(tmp_path / "schedule.json")
    apply_vsa(model, topk=vsa.StepSchedule.load(tmp_path / "schedule.json"), tile=tile)
    assert "topk=StepSchedule({0: None, 1: <vsa.Budgets of 24 tiles" in repr(model)
    with collect(model) as kept:
        outs = [run(model, at(inputs, timestep)) for timestep in STEPS]
    tiles = kept.density.mean(-1) * 12
    assert tiles[:, 0].isnan().all()  # diffusers' own attention
    torch.testing.assert_close(tiles[:, 1:].mean(0), torch.tensor([6.0, 6.0, 3.0]))
    remove_vsa(model)
    assert torch.equal(outs[0], run(model, at(inputs, STEPS[0])))
    each = vsa.calibrate(record, 4, per_step=True, aim="worst")
    assert isinstance(each, vsa.StepSchedule) and list(each.steps) == [0, 1, 2, 3]
    totals = [budgets.total for budgets in each.steps.values() if isinstance(budgets, vsa.Budgets)]
    assert sum(totals) == 4 * 2 * HEADS * 4


@torch.no_grad()
def test_compiled_blocks_with_many_budgets_share_their_code() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, inputs = wan(num_layers=12)
    each = [(1 + n, 12 - n) for n in range(12)]
    budgets = vsa.Budgets({f"blocks.{n}": vsa.LayerBudget(x, 12) for n, x in enumerate(each)})
    apply_vsa(model, topk=budgets, tile=(2, 3, 4))
    expected = run(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(model, inputs), expected)
    assert counter.frame_count == 1
