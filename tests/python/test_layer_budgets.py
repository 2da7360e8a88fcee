# SPDX-License-Identifier: Apache-2.0
"""``vsa.LayerBudget`` as ``topk``, and ``vsa.StepSchedule``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vsa

BUDGET = vsa.LayerBudget((1, 6, 12), 12)


@pytest.mark.parametrize("backend", ["torch", "emulated", "flex", "hopper"])
def test_every_backend_keeps_what_each_head_is_given(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 10, 3, 64).bfloat16().unbind()
    if backend == "hopper":
        if not torch.cuda.is_available():
            pytest.skip("a Hopper GPU is needed")
        q, k, v = q.cuda(), k.cuda(), v.cuda()
    if backend == "flex":
        q, k, v = (x.float() for x in (q, k, v))
    try:
        out, selection = vsa.attention(q, k, v, BUDGET, backend=backend, return_selection=True)
    except RuntimeError as error:
        pytest.skip(str(error))
    counts = selection.mask().sum(-1).cpu()
    assert (counts == torch.tensor([1, 6, 12])[:, None]).all() and selection.most == 12
    assert torch.equal(out, vsa.attention(q, k, v, (1, 6, 12), backend=backend))
    again = vsa.attention(q, k, v, BUDGET, backend=backend)  # by a plan, if there are some
    other = vsa.attention(q, k, v, vsa.LayerBudget((2, 6, 12), 12), backend=backend)
    assert torch.equal(again, out) and not torch.equal(other, out)


def test_it_is_for_one_grid_and_so_many_heads() -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 10, 3, 8).unbind()
    with pytest.raises(ValueError, match=r"topk was found for a grid of 11 key tiles, .* has 12"):
        vsa.attention(q, k, v, vsa.LayerBudget((1, 6, 11), 11))
    with pytest.raises(ValueError, match="one number per query head, but it has 2 for 3 heads"):
        vsa.attention(q, k, v, vsa.LayerBudget((1, 6), 12))
    with pytest.raises(ValueError, match="one number per query head, but it has 3 for 2 heads"):
        vsa.nn.VideoSparseAttention(32, 2, BUDGET)
    full = vsa.LayerBudget((12, 12, 12), 12)
    torch.testing.assert_close(vsa.attention(q, k, v, full), vsa.attention(q, k, v, 1.0))
    assert vsa.flops((5, 6, 10), 3, 8, BUDGET).fine == vsa.flops((5, 6, 10), 3, 8, (1, 6, 12)).fine


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((), 12), "counts must be a tuple or list of at least one"),
        (((0, 1), 12), r"counts\[0\] must be at least 1"),
        (((1, 13), 12), r"counts\[1\] must be at most num_tiles, but it is 13 of 12"),
        (((1.5,), 12), r"counts\[0\] must be a whole number"),
        (((1,), 0), "num_tiles must be at least 1"),
    ],
)
def test_bad_budgets_of_a_layer(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        vsa.LayerBudget(*arguments)


def test_compiled_layers_take_it() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 5, 6, 10, 3, 16).unbind())
    compiled = torch.compile(vsa.attention, fullgraph=True, backend="aot_eager")
    for budget in (BUDGET, vsa.LayerBudget((2, 3, 4), 12)):
        eager, found = (call(q, k, v, budget) for call in (vsa.attention, compiled))
        torch.testing.assert_close(found, eager)
    layer = vsa.nn.VideoSparseAttention(48, 3, 1.0)
    x = torch.randn(1, 5, 6, 10, 48)
    layer.topk = BUDGET
    assert "topk=1 to 12 of 12 tiles by head" in repr(layer)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)
    assert not torch.allclose(expected, vsa.nn.VideoSparseAttention.forward(_dense(layer), x))


def _dense(layer: vsa.nn.VideoSparseAttention) -> vsa.nn.VideoSparseAttention:
    layer.topk = 1.0
    return layer


def test_budgets_are_of_one_grid() -> None:
    a, b = vsa.LayerBudget((1, 2), 12), vsa.LayerBudget((3,), 12)
    budgets = vsa.Budgets({"a": a, "b": b})
    assert (budgets.total, budgets.heads, budgets.uniform) == (6, 3, 2)
    assert budgets.density == pytest.approx(6 / 36) and "6 tiles for 3 heads" in repr(budgets)
    with pytest.raises(ValueError, match="layers must share a grid, but they are for 12 and 13"):
        vsa.Budgets({"a": a, "b": vsa.LayerBudget((3,), 13)})
    with pytest.raises(ValueError, match="layers must name at least one layer"):
        vsa.Budgets({})
    with pytest.raises(TypeError, match=r"layers\['a'\] must be a vsa.LayerBudget"):
        vsa.Budgets({"a": (1, 2)})  # type: ignore[dict-item]


def test_a_step_takes_the_latest_budget_before_it() -> None:
    schedule = vsa.StepSchedule({12: 0.1, 0: None, 4: 0.3})
    assert [schedule(7, step) for step in (0, 3, 4, 11, 12, 99)] == [None, None, 0.3, 0.3, 0.1, 0.1]
    assert repr(schedule) == "StepSchedule({0: None, 4: 0.3, 12: 0.1})"


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ({}, "0 must be among them"),
        ({1: 0.5}, "0 must be among them"),
        ([0.5], "steps must map first steps to budgets"),
        ({0: 0.5, -1: 0.5}, "a key of steps must be at least 0"),
        ({0: 1.5}, "topk as a float is a share"),
        ({0: "0.1"}, r"steps\[0\] must be None, a number"),
        ({0: ()}, r"steps\[0\] must be a tuple or list of at least one"),
        ({0: (1, "a")}, r"topk\[1\] must be an int"),
    ],
)
def test_bad_schedules(steps: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        vsa.StepSchedule(steps)


@pytest.mark.parametrize("step", [-1, 1.5, "1"])
def test_a_step_is_a_count(step: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="step must be"):
        vsa.StepSchedule({0: None, 4: 0.3})(0, step)


def test_every_kind_of_budget_comes_back_from_a_file(tmp_path: Path) -> None:
    of_layer = vsa.LayerBudget((np.int64(1), 2), np.int64(4))  # type: ignore[arg-type]
    schedule = vsa.StepSchedule(
        {
            0: None,
            1: 0.3,
            np.int64(2): np.int64(7),  # type: ignore[dict-item]
            3: (1, np.float64(0.5)),
            4: vsa.TopP(np.float32(0.5), np.int64(2)),  # type: ignore[arg-type]
            5: of_layer,
            6: vsa.Budgets({"a": of_layer}),
        }
    )
    schedule.save(tmp_path / "schedule.json")
    found = vsa.StepSchedule.load(tmp_path / "schedule.json")
    assert repr(found) == repr(schedule)
    assert [found.at(step) for step in range(6)] == [schedule.at(step) for step in range(6)]
    budgets = found.at(6)
    assert isinstance(budgets, vsa.Budgets) and budgets.layers == {"a": of_layer}


def test_a_step_that_a_file_names_twice_is_refused(tmp_path: Path) -> None:
    content = {"format": "vsa step schedule", "steps": [{"from": 0, "topk": 1}] * 2}
    (tmp_path / "schedule.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a step is named twice"):
        vsa.StepSchedule.load(tmp_path / "schedule.json")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": [1]}, "layers must map names to vsa.LayerBudget"),
        ({"layers": {3: vsa.LayerBudget((1, 2), 4)}}, "layers must have names, but one is 3"),
        ({"recall": {}}, "recall must be for all layers and no others"),
        ({"recall": {"a": (0.5,)}}, r"recall\['a'\] must have one share per query head"),
        ({"recall_uniform": {"a": ("x", "y")}}, r"recall_uniform\['a'\] must be numbers"),
        ({"error": {"b": (0.1, 0.2)}}, "error must be for all layers and no others"),
        ({"aim": 3}, "aim must be a word"),
        ({"grid": "abc"}, "grid must be three token counts"),
        ({"grid": (4, 4, 4), "tile": (8, 8, 8)}, "tile must hold at most 64 tokens"),
        ({"grid": (8, 8, 8), "tile": (4, 4, 4)}, "layers must be for the 8 tiles of the grid"),
        ({"score": 3}, "score must be a word"),
    ],
)
def test_what_budgets_say_of_themselves_is_checked(arguments: Any, sentence: str) -> None:
    given = {"layers": {"a": vsa.LayerBudget((1, 2), 4)}} | arguments
    with pytest.raises((ValueError, TypeError), match=sentence):
        vsa.Budgets(**given)


def test_a_layer_that_is_the_model_has_no_name_compiled_or_not() -> None:
    budget = vsa.LayerBudget((1, 2), 4)
    layer = vsa.nn.VideoSparseAttention(128, 2)
    for model in (layer, torch.compile(layer, backend="eager")):
        layer.topk = 1.0
        vsa.Budgets({"": budget}).apply_to(model)
        assert layer.topk is budget
    with pytest.raises(TypeError, match="model must be a module"):
        vsa.Budgets({"": budget}).apply_to(3)  # type: ignore[arg-type]
