# SPDX-License-Identifier: Apache-2.0
"""Coarse gates under FastVideo's names: saved, loaded, weighed and refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vsa

pytest.importorskip("diffusers")
from integrations.tiny_transformers import BATCH, FAMILIES, HEAD_DIM, HEADS, cogvideox, run, wan

from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates, remove_vsa
from vsa.integrations.diffusers.coordinates import Layout
from vsa.integrations.diffusers.plan import Plan


def test_fastvideo_gates_round_trip_and_weigh_the_coarse_branch() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2, gates="coarse")
    fine_only = run(model, inputs)
    dim = HEADS * HEAD_DIM
    checkpoint = {
        f"blocks.{layer}.to_gate_compress.{name}": torch.randn(shape)
        for layer in range(2)
        for name, shape in (("weight", (dim, dim)), ("bias", (dim,)))
    }
    load_gates(model, {**checkpoint, "blocks.0.attn1.to_q.weight": torch.zeros(1)})
    saved = gates_state_dict(model)
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in checkpoint)
    gated = run(model, inputs)
    assert (gated - fine_only).abs().max() > 1e-3
    gated.sum().backward()
    assert all(b.attn1.to_gate_compress.weight.grad.abs().max() > 0 for b in model.blocks)

    # diffusers' own naming, as transformer.state_dict() has it, under a prefix
    own = {f"transformer.{name}": value.clone() for name, value in model.state_dict().items()}
    apply_vsa(remove_vsa(model), topk=2, gates="coarse")
    assert torch.equal(run(model, inputs), fine_only)
    load_gates(model, own)
    assert torch.equal(run(model, inputs), gated)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saves_and_loads_its_gates_and_zero_ones_change_nothing(family: Any) -> None:
    model, inputs = family()
    plain = run(apply_vsa(model, topk=2, tile=(4, 4, 4)), inputs)
    apply_vsa(model, topk=2, gates="coarse")
    torch.testing.assert_close(run(model, inputs), plain, rtol=0, atol=1e-6)
    load_gates(model, {k: torch.full_like(v, 0.1) for k, v in model.state_dict().items()})
    assert all((value == 0.1).all() for value in gates_state_dict(model).values())
    assert (run(model, inputs) - plain).abs().max() > 1e-4


@torch.no_grad()
def test_a_gated_layer_is_coarse_times_gate_plus_fine_on_tiles_of_64() -> None:
    model, _ = wan()
    apply_vsa(model, topk=3, gates="coarse")
    attn = model.blocks[0].attn1
    nn.init.normal_(attn.to_gate_compress.weight)
    nn.init.normal_(attn.to_gate_compress.bias)
    grid = vsa.Grid((5, 6, 7), tile=(4, 4, 4))
    x = torch.randn(BATCH, grid.tokens, HEADS * HEAD_DIM)
    model._vsa_plan._set({0: model._vsa_plan._work(0, Layout(grid.shape))})
    q, k, v, gate = (
        projected.unflatten(2, (HEADS, HEAD_DIM))
        for projected in (
            attn.norm_q(attn.to_q(x)),
            attn.norm_k(attn.to_k(x)),
            attn.to_v(x),
            attn.to_gate_compress(x),
        )
    )
    fine = vsa.attention(q, k, v, 3, grid=grid)
    means = grid.to_tiles(torch.cat([q, k, v])).sum(2) / grid.sizes[:, None, None]
    q_mean, k_mean, v_mean = means.transpose(1, 2).chunk(3)
    coarse = nn.functional.scaled_dot_product_attention(q_mean, k_mean, v_mean)
    rows = coarse.transpose(1, 2)[:, grid.tile_of_token()]
    wanted = attn.to_out[0]((rows * gate + fine).flatten(2))
    torch.testing.assert_close(attn(x), wanted, rtol=1e-4, atol=1e-5)


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_loaded() -> None:
    model, _ = wan()
    apply_vsa(model, topk=2)
    with pytest.raises(ValueError, match=r"no coarse gates: call apply_vsa"):
        load_gates(model, {})
    apply_vsa(model, topk=2, gates="coarse")
    good = {name: torch.ones_like(value) for name, value in gates_state_dict(model).items()}
    missing = {name: value for name, value in good.items() if "blocks.0" in name}
    extra = {**good, "blocks.2.to_gate_compress.bias": torch.ones(HEADS * HEAD_DIM)}
    misshapen = {**good, "blocks.1.to_gate_compress.bias": torch.ones(3)}
    for bad, sentence in (
        (missing, r"state_dict lacks blocks\.1\.to_gate_compress"),
        (extra, r"no layer for blocks\.2\.to_gate_compress\.bias"),
        (misshapen, r"blocks\.1\.to_gate_compress\.bias as \(3,\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_gates(model, bad)
    assert all(value.abs().max() == 0 for value in gates_state_dict(model).values())


def trained(model: nn.Module) -> nn.Module:
    apply_vsa(model, topk=2, gates="coarse")
    for name, parameter in model.named_parameters():
        if "to_gate_compress" in name:
            nn.init.normal_(parameter)
    return model


def loaded_from(model: nn.Module, folder: Path, **more: Any) -> Any:
    """As the pages say it, with what the extra diffusers brings."""
    return type(model).from_pretrained(folder, **more)


def test_trained_gates_that_stay_in_the_folder_are_named(tmp_path: Path) -> None:
    model, _ = wan()
    trained(model).save_pretrained(tmp_path / "trained")
    wan()[0].save_pretrained(tmp_path / "plain")
    apply_vsa(zero := wan()[0], topk=2, gates="coarse")
    zero.save_pretrained(tmp_path / "zero")
    with pytest.warns(UserWarning, match=r"trained gates lie beside .* pass gates=\"coarse\"$"):
        apply_vsa(loaded_from(model, tmp_path / "trained"), topk=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_vsa(loaded_from(model, tmp_path / "trained"), topk=2, gates="coarse")
        for name in ("plain", "zero"):
            apply_vsa(loaded_from(model, tmp_path / name), topk=2)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_gates_come_back_with_the_model_that_was_saved(family: Any, tmp_path: Path) -> None:
    model, inputs = family()
    wanted = run(trained(model), inputs)
    model.save_pretrained(tmp_path / "transformer")
    for folder, more in (
        (tmp_path / "transformer", {}),
        (tmp_path, {"subfolder": "transformer"}),
    ):
        loaded = loaded_from(model, folder, **more)
        apply_vsa(loaded, topk=2, gates="coarse")
        assert torch.equal(run(loaded, inputs), wanted)
    # another model knows no such folder, and takes the path
    other = type(model).from_config(model.config)
    other.register_to_config(_name_or_path="")
    apply_vsa(other, topk=2, gates="coarse")
    for path in (tmp_path / "transformer", str(next(tmp_path.rglob("*.safetensors")))):
        load_gates(other, path)
        saved, own = gates_state_dict(model), gates_state_dict(other)
        assert all(torch.equal(own[name], saved[name]) for name in saved)


@torch.no_grad()
def test_gates_that_could_be_of_two_transformers_are_not_guessed(tmp_path: Path) -> None:
    model, _ = wan()
    for name in ("transformer", "transformer_2"):
        trained(model).save_pretrained(tmp_path / name)
    loaded = loaded_from(model, tmp_path, subfolder="transformer")
    with pytest.raises(ValueError, match="gates lie in transformer and transformer_2 of"):
        apply_vsa(loaded, topk=2, gates="coarse")
    assert not hasattr(loaded, "_vsa_plan")
    save_file({"proj_out.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for path, sentence in (
        (tmp_path / "other.safetensors", "none of its 1 safetensors files holds"),
        (tmp_path / "missing.safetensors", "state_dict would come from .* cannot be read"),
        (tmp_path, "none of its 1 safetensors files holds"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_gates(model, path)


@torch.no_grad()
def test_nothing_trained_is_deleted_without_being_asked() -> None:
    model, inputs = wan()
    wanted = run(trained(model), inputs)
    with pytest.raises(ValueError, match=r"^gates is None, but blocks\.0 has a trained gate"):
        apply_vsa(model, topk=0.5)
    assert torch.equal(run(model, inputs), wanted)
    apply_vsa(remove_vsa(model), topk=0.5)
    assert not any("to_gate_compress" in name for name in model.state_dict())
    apply_vsa(model, topk=2, gates="coarse")
    apply_vsa(model, topk=2)  # zero gates are nothing to keep
    assert not any("to_gate_compress" in name for name in model.state_dict())


@torch.no_grad()
def test_a_call_that_fails_midway_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (one, inputs), (two, _) = wan(), wan()
    wanted, plain = run(trained(one), inputs), run(two, inputs)
    hooks = len(one._forward_pre_hooks), len(one._forward_hooks)
    install, calls = Plan.install, []

    def failing(plan: Plan, module: nn.Module) -> None:
        install(plan, module)
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Plan, "install", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_vsa([one, two], topk=1, gates="coarse")
    assert calls[1] is two and calls[2] is one  # installed again
    assert torch.equal(run(one, inputs), wanted) and torch.equal(run(two, inputs), plain)
    assert (len(one._forward_pre_hooks), len(one._forward_hooks)) == hooks
    assert not two._forward_pre_hooks and not hasattr(two, "_vsa_plan")
    assert not any("to_gate_compress" in name for name in two.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("first", ["casting", "vsa"])
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_gates_and_layerwise_casting_in_either_order(storage: torch.dtype, first: str) -> None:
    model, inputs = wan()

    def cast() -> None:
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    if first == "casting":
        cast()
    apply_vsa(model, topk=2, gates="coarse")
    if first == "vsa":
        cast()
    gates = [block.attn1.to_gate_compress for block in model.blocks]
    assert {gate.weight.dtype for gate in gates} == {storage if first == "vsa" else torch.float32}
    gated = run(model, inputs)
    apply_vsa(model, topk=2, tile=(4, 4, 4))  # zero gates change nothing
    torch.testing.assert_close(gated, run(model, inputs), rtol=0, atol=1e-6)


def test_gates_take_the_type_that_a_quantised_layer_says() -> None:
    model, _ = wan()
    for block in model.blocks:  # as bitsandbytes holds 4 bits
        packed = torch.zeros(48, 24, dtype=torch.uint8)
        block.attn1.to_q.weight = nn.Parameter(packed, requires_grad=False)
        block.attn1.to_q.compute_dtype = torch.bfloat16
    apply_vsa(model, topk=2, gates="coarse")
    assert {x.dtype for x in gates_state_dict(model).values()} == {torch.bfloat16}
    x = torch.randn(2, 3, HEADS * HEAD_DIM)
    gate = model.blocks[0].attn1.to_gate_compress
    nn.init.normal_(gate.weight)
    wanted = nn.functional.linear(x, gate.weight.float(), gate.bias.float())
    assert gate(x).dtype == torch.float32
    torch.testing.assert_close(gate(x), wanted, rtol=2e-2, atol=2e-1)


def test_a_layer_shows_that_it_is_sparse() -> None:
    model, _ = wan()
    plain = str(model)
    apply_vsa(model, topk=0.25, gates="coarse", dense_steps=2, refresh_every=3, dense_layers=[0])
    shown = (
        "WanSparseProcessor(topk=0.25, tile=(4, 4, 4), gates=coarse, dense_steps=2, "
        "refresh_every=3, backend=auto)"
    )
    assert repr(model.blocks[1].attn1.processor) == shown and str(model).count(shown) == 1
    assert str(copy.deepcopy(model)).count(shown) == 1
    assert str(remove_vsa(model)) == plain


def test_fused_projections_of_cogvideox_are_refused_with_one_way_back() -> None:
    model, inputs = cogvideox()
    way = r"call transformer\.unfuse_qkv_projections\(\)"
    apply_vsa(model, topk=1.0)
    wanted = run(model, inputs)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=way):
        run(model, inputs)
    with pytest.raises(TypeError, match=way):
        apply_vsa(model, topk=1.0)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), wanted)
    assert torch.equal(run(apply_vsa(model, topk=1.0), inputs), wanted)
