# SPDX-License-Identifier: Apache-2.0
"""Coarse gates under FastVideo's names: saved, loaded, weighed and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vsa

pytest.importorskip("diffusers")
from tiny_transformers import BATCH, FAMILIES, HEAD_DIM, HEADS, run, wan

from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates
from vsa.integrations.diffusers.coordinates import Layout


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
    apply_vsa(model, topk=2)
    apply_vsa(model, topk=2, gates="coarse")
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
