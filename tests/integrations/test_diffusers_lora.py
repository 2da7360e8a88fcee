# SPDX-License-Identifier: Apache-2.0
"""LoRA by peft, as diffusers adds it, around sparse layers and their gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers.loaders import PeftAdapterMixin
from integrations.tiny_newer import easyanimate, minimax_h3
from integrations.tiny_transformers import UNLIKE, run, wan
from peft import LoraConfig

from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates, remove_vsa
from vsa.integrations.diffusers.gate_files import NAME as GATE

PROJECTIONS = ["to_q", "to_k", "to_v", "to_query", "to_key", "to_value"]


def add_lora(model: Any, *more: str) -> list[nn.Parameter]:
    """Give the projections an adapter that is not zero; -> its parameters."""
    model.add_adapter(LoraConfig(r=2, target_modules=[*PROJECTIONS, *more]))
    added = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    for name, parameter in added:
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return [parameter for _, parameter in added]


@pytest.mark.parametrize("first", ["lora", "vsa"])
@pytest.mark.parametrize("family", [family for family in UNLIKE if family is not easyanimate])
def test_adapters_work_and_learn_whichever_comes_first(family: Any, first: str) -> None:
    model, inputs = family()
    before = run(model, inputs).detach()
    if first == "vsa":
        apply_vsa(model, topk=1.0, gates="coarse")
    add_lora(model)
    if first == "lora":
        apply_vsa(model, topk=1.0, gates="coarse")
    sparse = run(model, inputs)
    sparse.square().sum().backward()
    layers = nn.ModuleList(model._vsa_plan.layers.values())
    added = [p for name, p in layers.named_parameters() if "lora_" in name]
    assert len(added) == 12 and all(parameter.grad is not None for parameter in added)
    with torch.no_grad():
        dense = run(remove_vsa(model), inputs)
        torch.testing.assert_close(sparse.detach(), dense, rtol=1e-4, atol=1e-4)
        assert (dense - before).abs().max() > 1e-4
        model.disable_adapters()
        apply_vsa(model, topk=1.0)
        torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["adapter, fused, sparse", "sparse, fused, adapter"])
@pytest.mark.parametrize("family", [wan, minimax_h3])
def test_an_adapter_that_fused_projections_leave_out_is_refused(family: Any, order: str) -> None:
    model, inputs = family()
    for step in order.split(", "):
        if step == "adapter":
            add_lora(model)
        elif step == "fused":
            model.fuse_qkv_projections()
        else:
            apply_vsa(model, topk=1.0)
    said = r"^transformer must have no adapters .*, but to_q has one: call transformer\.unfuse_qkv_"
    with torch.no_grad():
        with pytest.raises(ValueError, match=said):
            run(model, inputs)
        model.unfuse_qkv_projections()
        adapted = run(model, inputs)
        torch.testing.assert_close(run(remove_vsa(model), inputs), adapted, rtol=1e-4, atol=1e-4)
        model.disable_adapters()
        plain = run(model, inputs)
        assert (adapted - plain).abs().max() > 1e-4
        apply_vsa(model, topk=1.0).fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-4)


def test_diffusers_gives_easyanimate_no_adapters() -> None:
    """If it does one day, the test above takes it."""
    model, _ = easyanimate()
    assert not isinstance(model, PeftAdapterMixin)


def test_gates_under_an_adapter_are_saved_once_it_is_fused() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2, gates="coarse")
    added = add_lora(model, "to_gate_compress")
    run(model, inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in added)
    with pytest.raises(ValueError, match=r"gate of blocks\.0 is wrapped by a Linear of peft"):
        gates_state_dict(model)
    with torch.no_grad():
        adapted = run(model, inputs)
        model.fuse_lora()
        model.unload_lora()
        saved = gates_state_dict(model)
        assert len(saved) == 4 and all(saved[f"blocks.{n}.{GATE}.weight"].any() for n in range(2))
        remove_vsa(model)  # which drops the gates
        load_gates(apply_vsa(model, topk=2, gates="coarse"), saved)
        torch.testing.assert_close(run(model, inputs), adapted, rtol=1e-4, atol=1e-5)
