# SPDX-License-Identifier: Apache-2.0
"""What single families have of their own: audio, appended tokens, earlier frames, other masks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa

pytest.importorskip("diffusers")
from integrations.tiny_transformers import (
    BATCH,
    GRID,
    HEAD_DIM,
    HEADS,
    HISTORY,
    TEXT,
    anyflow,
    chronoedit,
    cogvideox,
    consisid,
    cosmos,
    easyanimate,
    framepack,
    hunyuan,
    hunyuan15,
    in_blocks,
    kandinsky5,
    kandinsky6,
    ltx2,
    ltx23,
    mochi,
    run,
    skyreels,
    wan_animate,
    wan_vace,
)

from vsa.integrations.diffusers import apply_vsa, load_gates, processors, remove_vsa

T, H, W = GRID
VIDEO = T * H * W


@torch.no_grad()
def equal_to_dense(model: nn.Module, inputs: dict[str, Any]) -> None:
    """All outputs of the model, kept whole and dense, and different where little is kept."""

    def outputs() -> list[Tensor]:
        out = model(**inputs, return_dict=False)
        return list(out) if isinstance(out, tuple) else [out]

    dense = outputs()
    apply_vsa(model, topk=1.0)
    for found, wanted in zip(outputs(), dense, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    apply_vsa(model, topk=1, tile=(2, 3, 4))
    assert (outputs()[0] - dense[0]).abs().max() > 1e-4


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = vsa.attention(q, k, v, *args, **kwargs)
        seen.append((q, k, v, kwargs, out))
        return out

    monkeypatch.setattr(processors, "attention", spy)
    return seen


def with_keyframes(model: Any, inputs: dict[str, Any], frames: int = 1) -> dict[str, Any]:
    """As LTX-2's condition pipeline calls it: tokens appended, with coordinates of their own."""
    rope = model.rope
    coords = [rope.prepare_video_coords(BATCH, n, H, W, "cpu", fps=24.0) for n in (T, frames)]
    coords[1][:, 0] += 3.0
    tokens = VIDEO + frames * H * W
    return {
        **inputs,
        "hidden_states": torch.randn(BATCH, tokens, 4),
        "video_coords": torch.cat(coords, dim=2),
    }


@pytest.mark.parametrize("family", [ltx2, ltx23])
def test_audio_of_ltx2_keeps_its_own_attention(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family()
    equal_to_dense(model, inputs)
    seen = spied(monkeypatch)
    for block in model.transformer_blocks:
        names = {name for name, each in block.named_children() if hasattr(each, "processor")}
        ours = {
            name
            for name in names
            if type(getattr(block, name).processor).__name__ == "LTX2SparseProcessor"
        }
        assert ours == {"attn1"} and "audio_attn1" in names
    run(model, inputs)
    assert [q.shape[1] for q, *_ in seen] == [VIDEO] * 2


@pytest.mark.parametrize("mask", [None, [0.0, 0.0], [1.0, 0.0]], ids=["all", "zeros", "one"])
def test_values_stand_in_for_attention_where_ltx23_says_so(mask: Any) -> None:
    model, inputs = ltx23()
    inputs["spatio_temporal_guidance_blocks"] = [1]
    if mask is not None:
        inputs["perturbation_mask"] = torch.tensor(mask)
    equal_to_dense(model, inputs)


@torch.no_grad()
@pytest.mark.parametrize("gates", [None, "coarse"])
def test_tokens_appended_to_ltx2_are_attended_and_attend_everything(
    gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ltx2()
    inputs = with_keyframes(model, inputs)
    equal_to_dense(model, inputs)
    seen = spied(monkeypatch)
    apply_vsa(model, topk=1, tile=(2, 3, 4), gates=gates)
    for block in model.transformer_blocks if gates else ():
        nn.init.normal_(block.attn1.to_gate_compress.weight)
    run(model, inputs)
    assert len(seen) == 2
    for q, k, v, given, out in seen:
        assert given["grid"].shape == GRID and given["grid"].suffix == H * W
        dense = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        torch.testing.assert_close(out[:, VIDEO:], dense[:, VIDEO:], rtol=1e-4, atol=1e-5)
        if gates:
            assert not given["gate_coarse"][:, VIDEO:].any()


@torch.no_grad()
def test_what_ltx2_cannot_be_sure_of_is_refused() -> None:
    model, inputs = ltx2()
    apply_vsa(model, topk=2)
    good = with_keyframes(model, inputs)
    mixed = good["video_coords"].flip(2)
    masked = torch.ones(BATCH, VIDEO, VIDEO)
    for changed, kind, sentence in (
        ({"video_self_attention_mask": masked}, NotImplementedError, "video_self_attention_mask"),
        ({"num_frames": None}, ValueError, r"num_frames, height and width are \(None, 6, 7\)"),
        ({"video_coords": None, "num_frames": T - 1}, ValueError, "for 210 tokens"),
        ({**good, "video_coords": mixed}, ValueError, "must begin with the 210 tokens of a video"),
        ({**good, "video_coords": mixed[..., 0]}, ValueError, r"must be \(B, 3, 252, 2\)"),
        ({"num_frames": T + 1, "video_coords": mixed[:, :, :VIDEO]}, ValueError, "must begin with"),
    ):
        with pytest.raises(kind, match=sentence):
            run(model, inputs | changed)


def test_gates_of_another_kind_under_the_same_name_are_refused() -> None:
    model, _ = ltx23()
    apply_vsa(model, topk=2, gates="coarse")
    per_head = {
        f"transformer_blocks.{layer}.attn1.to_gate_compress.{name}": torch.ones(shape)
        for layer in range(2)
        for name, shape in (("weight", (HEADS, HEADS * HEAD_DIM)), ("bias", (HEADS,)))
    }
    with pytest.raises(ValueError, match=r"to_gate_compress\.(weight|bias) as \(2,"):
        load_gates(model, per_head)


@torch.no_grad()
def test_skyreels_runs_with_a_timestep_per_frame() -> None:
    model, inputs = skyreels()
    equal_to_dense(model, in_blocks(model, inputs, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "prefix", "suffix"),
    # HunyuanVideo 1.5 adds text of a second encoder and an image's tokens.
    [
        *((hunyuan, 0, TEXT), (hunyuan15, 0, TEXT + 3 + 2), (mochi, 0, TEXT)),
        *((cogvideox, TEXT, 0), (consisid, TEXT, 0), (easyanimate, TEXT, 0)),
    ],
)
def test_text_of_joint_attention_is_outside_of_the_grid_and_so_dense(
    family: Any, prefix: int, suffix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family()
    seen: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["grid"], kwargs["text_valid"]))
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa(model, topk=1)
    run(model, inputs)
    assert len(seen) == 2
    for grid, valid in seen:
        assert (grid.shape, grid.prefix, grid.suffix) == (GRID, prefix, suffix)
        assert (valid is None) == bool(prefix), "text before the video is never masked"
        if valid is not None:
            assert valid.shape == (BATCH, suffix) and valid.sum(1).tolist() != [suffix] * 2


@torch.no_grad()
def test_sparsity_of_kandinskys_own_is_refused() -> None:
    model, inputs = kandinsky5()
    apply_vsa(model, topk=2)
    with pytest.raises(NotImplementedError, match=r"^sparse_params must be None"):
        run(model, inputs | {"sparse_params": {"to_fractal": True}})


@torch.no_grad()
@pytest.mark.parametrize("gates", [None, "coarse"])
def test_a_reference_frame_of_kandinsky6_is_attended_and_attends_everything(
    gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline appends such a frame, at the place of the first."""
    model, inputs = kandinsky6()
    del inputs["audio_hidden_states"]
    equal_to_dense(model, inputs)
    remove_vsa(model)
    times = torch.cat([torch.arange(T - 1), torch.zeros(1, dtype=torch.long)])
    inputs["visual_rope_pos"] = (times, torch.arange(H), torch.arange(W))
    equal_to_dense(model, inputs)
    seen = spied(monkeypatch)
    apply_vsa(model, topk=1, tile=(2, 3, 4), gates=gates)
    run(model, inputs)
    for q, k, v, given, out in seen:
        assert (given["grid"].shape, given["grid"].suffix) == ((T - 1, H, W), H * W)
        dense = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        torch.testing.assert_close(out[:, -H * W :], dense[:, -H * W :], rtol=1e-4, atol=1e-5)
    inputs["visual_rope_pos"] = tuple(map(torch.arange, GRID))
    run(model, inputs)
    assert seen[-1][3]["grid"].shape == GRID


@torch.no_grad()
def test_chronoedit_of_two_frames_and_anyflow_of_images_run() -> None:
    model, inputs = chronoedit()
    equal_to_dense(model, inputs | {"hidden_states": inputs["hidden_states"][:, :, :2]})
    model, inputs = anyflow()
    names = ("hidden_states", "timestep", "r_timestep")
    equal_to_dense(model, inputs | {name: inputs[name][:, :1] for name in names})


@torch.no_grad()
@pytest.mark.parametrize("videos", [1, BATCH])
def test_earlier_frames_of_framepack_are_attended_and_attend_everything(
    videos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = framepack()
    inputs = {name: x if name.startswith("indices") else x[:videos] for name, x in inputs.items()}
    equal_to_dense(model, inputs)
    seen = spied(monkeypatch)
    apply_vsa(model, topk=1, tile=(2, 3, 4), gates="coarse")
    run(model, inputs)
    assert len(seen) == 2
    for q, k, v, given, out in seen:
        grid = given["grid"]
        assert (grid.shape, grid.prefix, grid.suffix) == (GRID, HISTORY, TEXT + 2)
        # One video alone has its text cut to what is real.
        assert (given["text_valid"] is None) == (videos == 1)
        mask = None
        if videos > 1:
            mask = torch.ones(videos, 1, 1, q.shape[1], dtype=torch.bool)
            mask[:, 0, 0, HISTORY + VIDEO :] = given["text_valid"][:, HISTORY:]
            assert given["text_valid"][:, :HISTORY].all() and not mask.all()
        dense = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
        ).transpose(1, 2)
        torch.testing.assert_close(out[:, :HISTORY], dense[:, :HISTORY], rtol=1e-4, atol=1e-5)
        assert (out - dense)[:, HISTORY : HISTORY + VIDEO].abs().max() > 1e-3


@torch.no_grad()
def test_the_control_branch_of_vace_is_sparse_too_and_comes_first() -> None:
    model, inputs = wan_vace()
    equal_to_dense(model, inputs | {"control_hidden_states_scale": torch.tensor([0.5])})
    assert list(model._vsa_plan.layers) == ["vace_blocks.0", "blocks.0"]


@pytest.mark.parametrize(
    "family", [wan_vace, wan_animate, ltx2, skyreels, kandinsky5, framepack, cosmos, kandinsky6]
)
def test_a_group_is_refused_where_nobody_shares_the_video_out(family: Any) -> None:
    model, _ = family()
    with pytest.raises(
        NotImplementedError, match=r"^group must be None for a \w+, whose video cannot"
    ):
        apply_vsa(model, topk=2, group=object())
    assert not hasattr(model, "_vsa_plan")


@torch.no_grad()
def test_ltx2s_calls_of_one_step_are_one_step_whatever_their_batch() -> None:
    model, inputs = ltx23()
    one = {
        name: x[:1] if isinstance(x, Tensor) else x for name, x in inputs.items() if x is not None
    }
    both = {name: torch.cat([x, x]) if isinstance(x, Tensor) else x for name, x in one.items()}
    calls = (
        both,
        {**one, "spatio_temporal_guidance_blocks": [1]},
        {**one, "isolate_modalities": True},
    )
    apply_vsa(model, topk=2, dense_steps=1)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for timestep in (990.0, 700.0):
            latents = torch.randn_like(one["hidden_states"])
            for call in calls:
                videos = call["hidden_states"].shape[0]
                given = {
                    "hidden_states": latents.expand(videos, -1, -1),
                    "timestep": torch.full((videos,), timestep),
                }
                run(model, {**call, **given})
                steps.append(model._vsa_plan.steps.step)
    assert steps == [0, 0, 0, 1, 1, 1]
