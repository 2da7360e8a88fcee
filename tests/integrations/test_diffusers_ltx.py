# SPDX-License-Identifier: Apache-2.0
"""LTX as its condition pipelines call it: coordinates for a grid, keyframes in the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa

pytest.importorskip("diffusers")
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx import pipeline_ltx_i2v_long_multi_prompt as long_video
from integrations.tiny_transformers import BATCH, GRID, ltx, run

from vsa.integrations.diffusers import apply_vsa, processors
from vsa.integrations.diffusers.coordinates import layout_of

T, H, W = GRID
VIDEO = T * H * W
FRAME = H * W


def coordinates(frames: int, first: int = 0) -> Tensor:
    """(BATCH, 3, tokens) of frames from pixel frame ``first`` on, by the pipeline's own hand."""
    ids = LTXConditionPipeline._prepare_video_ids(BATCH, frames, H, W)
    return LTXConditionPipeline._scale_video_ids(ids, 32, 8, first)


def in_seconds(*parts: Tensor) -> Tensor:
    coords = torch.cat(parts, dim=2).float()
    coords[:, 0] /= 25
    return coords


LAYOUTS = {
    "no keyframe": (in_seconds(coordinates(T)), 0, 0),
    "keyframe before": (in_seconds(coordinates(1, 24), coordinates(T)), FRAME, 0),
    "two before": (
        in_seconds(coordinates(1, 32), coordinates(2, 16), coordinates(T)),
        3 * FRAME,
        0,
    ),
    "keyframe after": (in_seconds(coordinates(T), coordinates(1, 9)), 0, FRAME),
    "as long as the video": (in_seconds(coordinates(T, 8), coordinates(T)), VIDEO, 0),
}


def problem(coords: Tensor, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = ltx()
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    tokens = coords.shape[2]
    return model, {
        **inputs,
        "hidden_states": torch.randn(BATCH, tokens, 4, requires_grad=True),
        "video_coords": coords,
        **given,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_kept_is_the_dense_model_with_its_gradients(name: str) -> None:
    coords, before, after = LAYOUTS[name]
    assert layout_of(coords, coords.shape[2])[:3] == (GRID, before, after)
    model, inputs = problem(coords)
    found = []
    for sparse in (False, True):
        if sparse:
            apply_vsa(model, topk=1.0)
        out = run(model, inputs)
        (grad,) = torch.autograd.grad(out.square().sum(), inputs["hidden_states"])
        found.append((out.detach(), grad))
    for dense, kept in zip(*found, strict=True):
        torch.testing.assert_close(kept, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["keyframe before", "keyframe after"])
@pytest.mark.parametrize("gates", [None, "coarse"])
def test_keyframes_are_attended_and_attend_everything(
    name: str, gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    coords, before, after = LAYOUTS[name]
    model, inputs = problem(coords)
    seen: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = vsa.attention(q, k, v, *args, **kwargs)
        seen.append((q, k, v, kwargs["grid"], kwargs["gate_coarse"], out))
        return out

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa(model, topk=1, tile=(2, 3, 4), gates=gates)
    if gates:
        for block in model.transformer_blocks:
            nn.init.normal_(block.attn1.to_gate_compress.weight)
    assert run(model, inputs).isfinite().all()
    assert len(seen) == 2
    for q, k, v, grid, gate, out in seen:
        assert (grid.shape, grid.prefix, grid.suffix) == (GRID, before, after)
        dense = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        keyframes = torch.ones(q.shape[1], dtype=torch.bool)
        keyframes[before : before + VIDEO] = False
        torch.testing.assert_close(out[:, keyframes], dense[:, keyframes], rtol=1e-4, atol=1e-5)
        assert (out - dense)[:, ~keyframes].abs().max() > 1e-3
        if gates:
            assert not gate[:, keyframes].any() and gate[:, ~keyframes].all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 2])
def test_windows_of_the_long_pipeline_have_the_grid_of_their_coordinates(overlap: int) -> None:
    latents = torch.randn(BATCH, 4, T, H, W)
    coords = long_video.build_video_coords_for_window(latents, overlap, 0, 0, (8, 32, 32), 25)
    model, inputs = problem(coords, num_frames=1, height=1, width=1)
    dense = run(model, inputs)
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_coordinates_that_are_no_raster_are_refused() -> None:
    coords = LAYOUTS["no keyframe"][0]
    mixed = coords.clone()
    mixed[1] = mixed[1].flip(-1)
    for bad in (
        torch.rand(BATCH, 3, VIDEO),
        coords[:, :, torch.randperm(VIDEO)],
        coords[:, :, : VIDEO - 1],
        mixed,
    ):
        model, inputs = problem(bad)
        apply_vsa(model, topk=0.5)
        with pytest.raises(ValueError, match="video_coords must be those of whole frames"):
            run(model, inputs)
    with pytest.raises(ValueError, match=r"video_coords must be \(B, 3, 9\), as hidden_states"):
        layout_of(coords, 9)
    # Extents that are those of the tokens need no coordinates.
    model, inputs = problem(torch.rand(BATCH, 3, VIDEO), num_frames=T, height=H, width=W)
    dense = run(model, inputs)
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)
