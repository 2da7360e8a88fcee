# SPDX-License-Identifier: Apache-2.0
"""``torch.export`` of whole sparse transformers, and what one graph cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from integrations.tiny_transformers import hunyuan, run, wan

from vsa.integrations.diffusers import apply_vsa, collect, denoising_step


def export(model: Any, inputs: dict[str, Any], strict: bool = False) -> Any:
    return torch.export.export(model, (), {**inputs, "return_dict": False}, strict=strict)


def result(program: Any, inputs: dict[str, Any]) -> Tensor:
    return program.module()(**inputs, return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize(("family", "gates"), [(wan, "coarse"), (hunyuan, None)])
def test_an_exported_transformer_is_the_sparse_one(family: Any, gates: Any, tmp_path: Path) -> None:
    model, inputs = family()
    dense = run(model.eval(), inputs)
    apply_vsa(model, topk=2, gates=gates)
    wanted = run(model, inputs)
    torch.export.save(export(model, inputs), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    torch.testing.assert_close(result(program, inputs), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - dense).abs().max() > 1e-3
    # tiles are chosen in the graph, not kept from the input that it was made with
    other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
    torch.testing.assert_close(result(program, other), run(model, other), rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, inputs), wanted)


@torch.no_grad()
def test_what_depends_on_steps_is_exported_where_the_step_is_said() -> None:
    model, inputs = wan(num_layers=1)
    apply_vsa(model.eval(), topk=2, dense_steps=1)
    for settings in ({"dense_steps": 1}, {"topk": lambda layer, step: 2}):
        apply_vsa(model, **{"topk": 2} | settings)
        with pytest.raises(NotImplementedError, match=r"takes effect by denoising steps, which to"):
            export(model, inputs)
    for step in range(2):
        apply_vsa(model, topk=2, dense_steps=1)
        with denoising_step(step):
            program, wanted = export(model, inputs), run(model, inputs)
        torch.testing.assert_close(result(program, inputs), wanted, rtol=1e-4, atol=1e-4)
    apply_vsa(model, topk=2, refresh_every=3)
    with (
        denoising_step(1),
        pytest.raises(NotImplementedError, match=r"refresh_every must be 1 .* 3"),
    ):
        export(model, inputs)
    apply_vsa(model, topk=2)
    wanted = run(model, inputs)
    with collect(model), pytest.raises(NotImplementedError, match="collect looks at values"):
        export(model, inputs)
    assert torch.equal(run(model, inputs), wanted)


@torch.no_grad()
def test_one_graph_of_everything_says_what_to_do_instead() -> None:
    model, inputs = wan(num_layers=1)
    apply_vsa(model.eval(), topk=2)
    sentence = (
        r"apply_vsa reads the grid and the step before every pass, which cannot be traced: use"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=sentence):
        export(model, inputs, strict=True)
    around = torch.compile(lambda **given: run(model, given), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=sentence):
        around(**inputs)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(whole, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)
