# SPDX-License-Identifier: Apache-2.0
"""Transformers under a mask: SkyReels-V2's own in diffusion forcing, and ours around Wan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vsa

pytest.importorskip("diffusers")
from integrations.tiny_transformers import in_blocks, run, skyreels, wan

from vsa.integrations.diffusers import apply_vsa, collect, remove_vsa


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 3])
def test_skyreels_is_its_dense_self_under_its_own_mask(frames: int) -> None:
    model, inputs = skyreels()
    inputs = in_blocks(model, inputs, frames)
    dense = run(model, inputs)
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)
    apply_vsa(model, topk=1, dense_layers=[0])
    sparse = run(model, inputs)
    assert (sparse - dense).abs().max() > 1e-4
    after = inputs["hidden_states"].clone()
    after[:, :, frames:] += 1
    moved = (run(model, inputs | {"hidden_states": after}) - sparse).abs()
    assert moved[:, :, :frames].max() == 0 < moved[:, :, frames:].max(), "no block sees later ones"
    apply_vsa(model, topk=1.0, dense_layers=[0], mask=vsa.masks.ChunkCausal(frames, window=1))
    alone = run(model, inputs)
    before = inputs["hidden_states"].clone()
    before[:, :, :frames] += 1
    moved = (run(model, inputs | {"hidden_states": before}) - alone).abs()
    assert moved[:, :, frames:].max() == 0 < moved[:, :, :frames].max(), "nor earlier ones"


@torch.no_grad()
def test_sparse_layers_use_no_backend_of_diffusers_which_may_know_no_mask() -> None:
    """findings/causal_mask_in_varlen.sh"""
    model, inputs = skyreels()
    inputs = in_blocks(model, inputs, 2)
    dense = run(model, inputs)
    apply_vsa(model, topk=1.0)
    for block in model.blocks:
        for processor in (block.attn1.processor, block.attn1.processor.original):
            processor._attention_backend = "any use of it is an error"
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="any use of it is an error"):
        run(remove_vsa(model), inputs)


@torch.no_grad()
def test_a_mask_of_another_block_than_the_models_own() -> None:
    model, inputs = skyreels()
    inputs = in_blocks(model, inputs, 3)
    for mask in (vsa.masks.ChunkCausal(2), vsa.masks.Window((1, 1, 1))):
        apply_vsa(model, topk=1.0, mask=mask)
        with pytest.raises(ValueError, match="mask must be None or a ChunkCausal of 3 frames"):
            run(model, inputs)
    with pytest.raises(TypeError, match="mask must be None or a rule of"):
        apply_vsa(model, mask=torch.ones(2, 2, dtype=torch.bool))
    apply_vsa(model, topk=1.0, tile=(2, 3, 4))
    with pytest.raises(ValueError, match="straddles two of them"):
        run(model, inputs)
    with (
        pytest.raises(NotImplementedError, match=r"collect cannot look .* under a mask"),
        collect(apply_vsa(model, topk=1.0)),
    ):
        run(model, inputs)


@torch.no_grad()
@pytest.mark.parametrize("dense", [{}, {"dense_layers": [0]}, {"dense_steps": 1}], ids=str)
def test_a_mask_makes_wan_causal_in_all_layers_and_steps(dense: dict[str, Any]) -> None:
    """Weights of causal Wan models are in diffusers' form of Wan, which has no mask of its own."""
    model, inputs = wan()
    apply_vsa(model, topk=0.5, mask=vsa.masks.ChunkCausal(1), **dense)
    assert "mask=ChunkCausal(frames=1" in str(model)
    before = run(model, inputs)
    later = inputs["hidden_states"].clone()
    later[:, :, 2:] += 1
    apply_vsa(model, topk=0.5, mask=vsa.masks.ChunkCausal(1), **dense)
    moved = (run(model, inputs | {"hidden_states": later}) - before).abs()
    assert moved[:, :, :2].max() == 0 < moved[:, :, 2:].max()
