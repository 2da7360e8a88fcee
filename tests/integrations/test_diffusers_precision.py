# SPDX-License-Identifier: Apache-2.0
"""Low precision by layer and step in a transformer of diffusers, and what tells where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import vsa
from vsa.cli.wan.model import random_model
from vsa.integrations.diffusers import apply_vsa, collect, remove_vsa
from vsa.values.precision import HEAD_DIMS

OPTIONS: dict[str, Any] = {"topk": 3, "tile": (2, 4, 4)}


def tiny() -> tuple[Any, dict[str, Any]]:
    """Two layers of two heads in bf16, and what they are called with: 5x8x10 tokens."""
    model = random_model("tiny", None, torch.device("cpu"), torch.bfloat16)
    return model, {
        "hidden_states": torch.randn(1, 16, 5, 16, 20).bfloat16(),
        "timestep": torch.full((1,), 900.0),
        "encoder_hidden_states": torch.randn(1, 6, 32).bfloat16(),
    }


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any], timestep: float = 900.0) -> torch.Tensor:
    inputs = inputs | {"timestep": torch.full((1,), timestep)}
    return model(**inputs, return_dict=False)[0]


def test_a_name_a_list_and_a_function_say_the_same() -> None:
    model, inputs = tiny()
    native = run(apply_vsa(model, **OPTIONS), inputs)
    outputs = {}
    for name in ("int8", "fp8"):
        outputs[name] = run(apply_vsa(model, **OPTIONS, precision=name), inputs)
        for same in ([name, name], (name, name), lambda layer, step, name=name: name):
            assert torch.equal(
                run(apply_vsa(model, **OPTIONS, precision=same), inputs), outputs[name]
            )
    assert not torch.equal(outputs["int8"], native) and not torch.equal(outputs["fp8"], native)
    assert not torch.equal(outputs["int8"], outputs["fp8"])
    mixed = run(apply_vsa(model, **OPTIONS, precision=["native", "int8"]), inputs)
    assert all(not torch.equal(mixed, other) for other in (native, *outputs.values()))
    apply_vsa(model, **OPTIONS, precision=["native", "native"])
    assert torch.equal(run(model, inputs), native)
    assert torch.equal(run(apply_vsa(model, **OPTIONS), inputs), native)


def test_a_function_goes_by_the_denoising_step() -> None:
    model, inputs = tiny()
    steps = (900.0, 800.0, 700.0)
    wanted = {
        name: [run(apply_vsa(model, **OPTIONS, precision=name), inputs, at) for at in steps]
        for name in ("native", "fp8")
    }
    seen = []

    def late(layer: int, step: int) -> str:
        seen.append((layer, step))
        return "native" if step < 2 else "fp8"

    apply_vsa(model, **OPTIONS, precision=late)
    found = [run(model, inputs, at) for at in steps]
    assert seen == [(layer, step) for step in range(3) for layer in range(2)]
    assert torch.equal(found[0], wanted["native"][0]) and torch.equal(found[1], wanted["native"][1])
    assert torch.equal(found[2], wanted["fp8"][2])


def test_what_is_dense_stays_as_it_is() -> None:
    model, inputs = tiny()
    dense = run(model, inputs)
    for more in ({"dense_layers": [0, 1]}, {"dense_steps": 1}):
        apply_vsa(model, **OPTIONS, precision="int8", **more)
        assert torch.equal(run(model, inputs), dense)
    remove_vsa(model)
    assert torch.equal(run(model, inputs), dense)


def test_it_is_shown() -> None:
    model, _ = tiny()
    assert "precision" not in repr(apply_vsa(model, **OPTIONS))
    assert "precision=fp8, backend" in repr(apply_vsa(model, **OPTIONS, precision="fp8"))
    apply_vsa(model, **OPTIONS, precision=["int8", "native"])
    assert "precision=1 x int8, 1 x native" in repr(model)


@pytest.mark.parametrize(
    ("precision", "kind", "sentence"),
    [
        ("int4", ValueError, r'precision must be "native", "int8" or "fp8", but it is \'int4\''),
        (["int8"], ValueError, "precision must have one name for each of the 2 layers, .* has 1"),
        (["int8", "bf16"], ValueError, r"in every layer, but it is 'bf16' in layer 1"),
        (8, TypeError, "precision must be .* a list with one of these for each layer, .* a int"),
        (None, TypeError, "precision must be .* but it is a NoneType"),
    ],
)
def test_bad_precisions_are_refused_and_nothing_is_changed(precision, kind, sentence) -> None:
    model, inputs = tiny()
    before = run(apply_vsa(model, **OPTIONS), inputs)
    with pytest.raises(kind, match=sentence):
        apply_vsa(model, **OPTIONS, precision=precision)
    for other in ("fp8", ["native", "int8"]):
        with pytest.raises(ValueError, match=r"tail must be False for precision='(fp8|int8)'"):
            apply_vsa(model, **OPTIONS, precision=other, tail=True)
    assert torch.equal(run(model, inputs), before)


def test_a_function_that_returns_something_else_is_named() -> None:
    model, inputs = tiny()
    apply_vsa(model, **OPTIONS, precision=lambda layer, step: None)
    with pytest.raises(ValueError, match="in layer 0 and step 0 it returns None"):
        run(model, inputs)
    apply_vsa(model, **OPTIONS)
    assert run(model, inputs).isfinite().all()  # a pass that failed leaves nothing behind


def test_training_and_other_types_are_refused_in_a_sentence() -> None:
    model, inputs = tiny()
    apply_vsa(model.requires_grad_(), **OPTIONS, precision="int8")
    with pytest.raises(ValueError, match=r"q wants a gradient, but precision='int8' is for infer"):
        model(**inputs)
    run(model, inputs)
    with pytest.raises(TypeError, match=r"q must be bf16 or fp16 for precision='int8'"):
        run(model.float(), {name: x.float() for name, x in inputs.items()})


def test_selections_are_taken_again_and_gates_stay() -> None:
    model, inputs = tiny()
    apply_vsa(model, topk=3, tile=(4, 4, 4), precision="int8", refresh_every=2, gates="coarse")
    outputs = [run(model, inputs, at) for at in (900.0, 800.0)]
    assert all(out.isfinite().all() for out in outputs)


def test_what_was_collected_chooses_layers() -> None:
    model, inputs = tiny()
    assert model.config.attention_head_dim in HEAD_DIMS
    apply_vsa(model, **OPTIONS)
    before = run(model, inputs)
    with collect(model, precisions=["int8", "fp8"]) as record:
        for at in (900.0, 800.0):
            run(model, inputs, at)
    errors = record.precision
    assert errors is not None and errors.steps == [0, 1]
    assert errors.layers == ["blocks.0", "blocks.1"]
    for name, least, most in (("int8", 0.005, 0.06), ("fp8", 0.005, 0.1)):
        table = errors.of(name)
        assert table.shape == (2, 2) and (table > least).all() and (table < most).all()
    assert errors.choose(1.0) == ["fp8", "fp8"] and errors.choose(1e-4) == ["native"] * 2
    assert torch.equal(
        run(apply_vsa(model, **OPTIONS, precision=errors.choose(1e-4)), inputs), before
    )
    of_layers = errors.of("fp8").amax(1)
    limit = of_layers.mean().item()
    wanted = ["fp8" if error <= limit else "other" for error in of_layers.tolist()]
    found = errors.choose(limit)
    assert [each == "fp8" for each in found] == [each == "fp8" for each in wanted]
    apply_vsa(model, **OPTIONS, precision=found)
    assert isinstance(run(model, inputs), torch.Tensor)
    assert vsa.diagnostics.PrecisionErrors is type(errors)
