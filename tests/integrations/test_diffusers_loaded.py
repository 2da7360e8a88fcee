# SPDX-License-Identifier: Apache-2.0
"""Transformers as they are loaded and kept: quantised, offloaded, in files; and their gates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from accelerate import cpu_offload
from integrations.tiny_transformers import cogvideox, hunyuan, ltx, run, wan
from safetensors.torch import save_file

from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates, remove_vsa
from vsa.integrations.diffusers.gate_files import NAME

FAMILIES = [wan, hunyuan, ltx, cogvideox]


def trained(model: Any, std: float = 0.3) -> Any:
    apply_vsa(model, topk=2, gates="coarse")
    for name, parameter in model.named_parameters():
        if NAME in name:
            nn.init.normal_(parameter, std=std)
    return model


def gates_of(model: Any) -> list[Any]:
    return [getattr(attn, NAME) for attn in model._vsa_plan.layers.values()]


class Packed(nn.Parameter):
    """Stands for the parameters of quantisers: a class of its own, which shows other numbers."""


def as_a_class(model: Any, folder: Path) -> None:
    for gate in gates_of(model):
        gate.weight = Packed(gate.weight.detach(), requires_grad=False)


def as_whole_numbers(model: Any, folder: Path) -> None:
    for gate in gates_of(model):
        gate.weight = nn.Parameter(gate.weight.detach().to(torch.int8), requires_grad=False)


def by_accelerate(model: Any, folder: Path) -> None:
    cpu_offload(model, execution_device="cpu")


def to_a_disk(model: Any, folder: Path, kind: str) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


HIDDEN: dict[str, tuple[Callable[[Any, Path], None], str, bool]] = {
    "quantised": (as_a_class, r"quantised \(Packed of \w+\)", True),
    "whole numbers": (as_whole_numbers, r"quantised \(torch\.int8\)", False),
    "offloaded": (by_accelerate, "offloaded", True),
    "leaves on a disk": (
        lambda model, folder: to_a_disk(model, folder, "leaf_level"),
        "offloaded to a disk",
        True,
    ),
    "blocks on a disk": (
        lambda model, folder: to_a_disk(model, folder, "block_level"),
        "offloaded to a disk",
        True,
    ),
}
"""What hides a gate's values, what is said of it, and whether the model still runs as it did."""


@torch.no_grad()
@pytest.mark.parametrize("how", HIDDEN)
def test_gates_whose_values_are_hidden_are_neither_saved_nor_loaded_nor_lost(
    how: str, tmp_path: Path
) -> None:
    hide, said, runs = HIDDEN[how]
    model, inputs = wan()
    wanted = run(trained(model), inputs)
    other = {name: 2 * value for name, value in gates_state_dict(model).items()}
    hide(model, tmp_path)
    sentence = rf"^the gate of blocks\.0 is {said}, so that its weights can be neither saved nor l"
    with pytest.raises(ValueError, match=sentence):
        gates_state_dict(model)
    with pytest.raises(ValueError, match=sentence):
        load_gates(model, other)
    with pytest.raises(ValueError, match=rf"gate that may be trained, as it is {said} and cannot"):
        apply_vsa(model, topk=2)
    if runs:
        assert torch.equal(run(model, inputs), wanted)
        assert torch.equal(run(apply_vsa(model, topk=2, gates="coarse"), inputs), wanted)
    remove_vsa(model)
    assert run(model, inputs).isfinite().all()


OFFLOADED: dict[str, Callable[[Any, Path], None]] = {
    name: HIDDEN[name][0] for name in ("offloaded", "leaves on a disk", "blocks on a disk")
}


@torch.no_grad()
@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_that_come_after_offloading_are_right_and_can_be_saved(
    family: Any, how: str, tmp_path: Path
) -> None:
    model, inputs = family()
    wanted = run(trained(model), inputs)
    saved = {name: value.clone() for name, value in gates_state_dict(model).items()}
    dense = run(remove_vsa(model), inputs)
    OFFLOADED[how](model, tmp_path)
    load_gates(apply_vsa(model, topk=2, gates="coarse"), saved)
    for _ in range(2):  # hooks have put everything back after the first
        assert torch.equal(run(model, inputs), wanted)
    assert all(torch.equal(value, saved[name]) for name, value in gates_state_dict(model).items())
    assert torch.equal(run(remove_vsa(model), inputs), dense)


def saved_as(model: Any, folder: Path, scale: float, **more: Any) -> Tensor:
    """Save a model with its gates times ``scale``; -> one of them."""
    load_gates(model, {name: scale * value for name, value in gates_state_dict(model).items()})
    model.save_pretrained(folder, **more)
    return gates_of(model)[0].weight.detach().clone()


@torch.no_grad()
def test_gates_that_are_there_twice_with_other_values_are_not_guessed(tmp_path: Path) -> None:
    model, _ = wan()
    first = saved_as(trained(model), tmp_path / "variants", 1.0)
    saved_as(model, tmp_path / "variants", 2.0, variant="ema")
    saved_as(model, tmp_path / "beside", 1.0)
    save_file(
        {name: 3 * value for name, value in gates_state_dict(model).items()},
        tmp_path / "beside" / "gates.safetensors",
    )
    sentence = r"holds blocks\.\d\.to_gate_compress\.\w+ twice with other values, in .* and in .*: "
    for name in ("variants", "beside"):
        loaded = type(model).from_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=sentence + "leave only one there$"):
            apply_vsa(loaded, topk=2, gates="coarse")
        with pytest.raises(ValueError, match=sentence):
            load_gates(model, tmp_path / name)
        with pytest.warns(UserWarning, match="trained gates lie beside the weights is not known"):
            apply_vsa(loaded, topk=2)
    load_gates(model, tmp_path / "variants" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(gates_of(model)[0].weight, first)
    both = {f"transformer.{name}": value for name, value in gates_state_dict(model).items()}
    both |= {name.replace("transformer", "transformer_2"): 2 * x for name, x in both.items()}
    with pytest.raises(ValueError, match=r"in transformer\.blocks.* and in transformer_2\.blocks"):
        load_gates(model, both)
    assert torch.equal(gates_of(model)[0].weight, first)


@torch.no_grad()
def test_of_a_rounded_variant_beside_the_gates_the_exact_one_is_taken(tmp_path: Path) -> None:
    model, _ = wan()
    exact = saved_as(trained(model), tmp_path, 1.0)
    saved_as(model.to(torch.float16), tmp_path, 1.0, variant="fp16")
    loaded = type(model).from_pretrained(tmp_path)
    apply_vsa(loaded, topk=2, gates="coarse")
    assert torch.equal(gates_of(loaded)[0].weight, exact)


@torch.no_grad()
@pytest.mark.parametrize("archive", [True, False])
def test_gates_are_found_in_files_of_pytorch(archive: bool, tmp_path: Path) -> None:
    model, inputs = wan()
    wanted = run(trained(model), inputs)
    model.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    if not archive:
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    loaded = type(model).from_pretrained(tmp_path, use_safetensors=False)
    apply_vsa(loaded, topk=2, gates="coarse")
    assert torch.equal(run(loaded, inputs), wanted)
    file.write_bytes(b"something else")
    other = type(model).from_config(model.config)
    other.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model\.bin, which cannot be read as a"
    ):
        apply_vsa(other, topk=2, gates="coarse")


@torch.no_grad()
def test_a_sparse_model_goes_through_a_pickle(tmp_path: Path) -> None:
    model, inputs = wan()
    dense = run(model, inputs)
    wanted = run(trained(model), inputs)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded, inputs), wanted)
    assert torch.equal(run(remove_vsa(loaded), inputs), dense)
    assert torch.equal(run(model, inputs), wanted)


def in_bf16(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_torchao_has_quantised(family: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, inputs = family()
    model, inputs = model.bfloat16(), in_bf16(inputs)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    dense = run(model, inputs)
    sparse = run(apply_vsa(model, topk=1.0), inputs)
    torch.testing.assert_close(sparse, dense, rtol=0.05, atol=0.05)
    trained(model)
    assert {x.dtype for x in gates_state_dict(model).values()} == {torch.bfloat16}
    before = run(model, inputs)
    quantize_(model, Int8WeightOnlyConfig(version=2), lambda module, name: name.endswith(NAME))
    torch.testing.assert_close(run(model, inputs), before, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match=r"is quantised \(Int8Tensor of torchao\)"):
        gates_state_dict(model)
    with pytest.raises(ValueError, match=r"\(Int8Tensor of torchao\) and cannot be"):
        apply_vsa(model, topk=2)
