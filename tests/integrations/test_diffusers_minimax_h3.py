# SPDX-License-Identifier: Apache-2.0
"""MiniMax-H3 in diffusers: packed rows, its grid, its gates, its two schedules."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa

pytest.importorskip("diffusers")
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import before_denoise, modular_blocks_minimax_h3
from integrations.tiny_newer import AUDIO
from integrations.tiny_transformers import (
    BATCH,
    GRID,
    HEAD_DIM,
    HEADS,
    TEXT,
    minimax_h3,
    run,
)

from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates, processors
from vsa.verify import sequence_reference
from vsa.verify.sequence_reference import Part

T, H, W = GRID
VIDEO = T * H * W
STEPS = 3


def with_references(inputs: dict[str, Any], kinds: str = "image audio video") -> dict[str, Any]:
    """As the pipeline packs an image, a sound and a video with sound before what it generates."""
    names = kinds.split()
    references: Any = [SimpleNamespace(kind=kind, has_audio=kind != "image") for kind in names]
    sizes = {"image": (1, 6, 8), "video": (3, 4, 6)}
    latents = [torch.zeros(1, 4, *sizes[kind]) for kind in names if kind in sizes]
    rows = {"audio": 6, "video": 8}
    sounds = [torch.zeros(rows[kind], 4) for kind in names if kind in rows]
    pack = before_denoise.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence
    given = torch.ones(TEXT), references, latents, sounds, T, 2 * H, 2 * W, AUDIO
    positions, tags, video, audio, text, *_ = pack(*given, (1, 2, 2), 2, 2, 0)
    return {
        **inputs,
        "hidden_states": torch.randn(BATCH, len(video), 16),
        "audio_hidden_states": torch.randn(BATCH, len(audio), 4),
        "timestep": torch.tensor([0.3]),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = vsa.attention(q, k, v, *args, **kwargs)
        seen.append((q, k, v, kwargs, out))
        return out

    monkeypatch.setattr(processors, "attention", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("packed", [(), ("last",), ("first", "last"), "references"], ids=str)
def test_all_rows_but_the_videos_are_attended_and_attend_everything(
    packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = minimax_h3(keyframes=() if packed == "references" else packed)
    before = TEXT + len(packed) * H * W + 2 * AUDIO
    if packed == "references":
        inputs = with_references(inputs)
        before = TEXT + 3 * 4 + 6 + 8 + 3 * 2 * 3 + 2 * AUDIO
    dense = model(**inputs, return_dict=False)
    apply_vsa(model, topk=1.0)
    for found, wanted in zip(model(**inputs, return_dict=False), dense, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    seen = spied(monkeypatch)
    apply_vsa(model, topk=1, tile=(2, 3, 4))
    sparse = model(**inputs, return_dict=False)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(sparse, dense, strict=True))
    assert len(seen) == 2, "and not the text's own refiner"
    for q, k, v, given, out in seen:
        grid = given["grid"]
        assert (grid.shape, grid.prefix, grid.suffix) == (GRID, before, 0)
        exact = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        torch.testing.assert_close(out[:, :before], exact[:, :before], rtol=1e-4, atol=1e-5)
        assert (out - exact)[:, before:].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("keyframes", [(), ("first", "last")], ids=len)
def test_gates_weigh_a_coarse_branch_over_the_tiles_of_all_segments(
    keyframes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = minimax_h3(keyframes=keyframes)
    apply_vsa(model, topk=3, gates="coarse")
    attn = model.transformer_blocks[0].attn
    assert [*gates_state_dict(model)] == [
        f"transformer_blocks.{layer}.to_gate_compress.weight" for layer in range(2)
    ], "without a bias, as FastVideo's are"
    nn.init.normal_(attn.to_gate_compress.weight)
    seen = spied(monkeypatch)
    heard: list[Tensor] = []
    attn.to_gate_compress.register_forward_hook(lambda module, args, gate: heard.append(gate))
    run(model, inputs)
    q, k, v, given, out = seen[0]
    parts = [
        Part((1, 1, tokens), (1, 1, 64), is_flat=True, kept=True, dense=True)
        for tokens in (TEXT, len(keyframes) * H * W, 2 * AUDIO)
        if tokens
    ]
    parts.append(Part(GRID, (4, 4, 4)))
    gate = heard[0].unflatten(2, (HEADS, HEAD_DIM))
    wanted, *_ = sequence_reference.attention(q, k, v, parts, 3, gate_coarse=gate)
    assert given["gate_coarse"].abs().min() > 0, "also for text and audio"
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_choice_of_a_gated_layer_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = minimax_h3()
    apply_vsa(model, topk=2, gates="coarse", refresh_every=2)
    nn.init.normal_(model.transformer_blocks[1].attn.to_gate_compress.weight)
    reused: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        reused.append(kwargs["selection"] is not None)
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    outs = [
        run(model, inputs | {"timestep": inputs["timestep"] + torch.tensor([shift, shift, 0.0])})
        for shift in (0.0, 1e-6, 0.1)
    ]
    assert reused == [False] * 2 + [True] * 2 + [False] * 2
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_gates_that_cannot_be_honoured_are_refused() -> None:
    model, inputs = minimax_h3()
    apply_vsa(model, topk=2, gates="coarse")
    for kinds, sentence in (("image", "where references come"), ("video", "rows are not packed")):
        with pytest.raises(NotImplementedError, match=rf"^gates must be None .*{sentence}"):
            run(model, with_references(inputs, kinds))
    last = inputs["position_ids"].shape[0]
    order = torch.cat([torch.arange(TEXT, last), torch.arange(TEXT)])
    moved = torch.argsort(order)  # where each row goes
    other = {name: moved[inputs[f"{name}_indices"]] for name in ("video", "audio", "text")}
    rows = ("position_ids", "token_tags", "timestep_indices")
    text_last = {f"{name}_indices": x for name, x in other.items()} | {
        name: inputs[name][order] for name in rows
    }
    with pytest.raises(NotImplementedError, match=r"^gates must be None where rows are not packed"):
        run(model, inputs | text_last)
    dense = run(minimax_h3_like(model), inputs | text_last)
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs | text_last), dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"lacks transformer_blocks\.0\.to_gate_compress\.weight"):
        load_gates(apply_vsa(model, topk=2, gates="coarse"), {})


def minimax_h3_like(model: Any) -> Any:
    other = type(model).from_config(model.config)
    state = {name: x for name, x in model.state_dict().items() if "to_gate_compress" not in name}
    other.load_state_dict(state)
    return other.eval()


@torch.no_grad()
def test_rows_that_are_no_video_are_refused() -> None:
    model, inputs = minimax_h3(keyframes=())
    apply_vsa(model, topk=2)
    positions, video = inputs["position_ids"], inputs["video_indices"]
    mixed = positions.clone()
    mixed[-VIDEO:] = mixed[-VIDEO:][torch.randperm(VIDEO)]
    for changed, sentence in (
        ({"position_ids": mixed}, rf"whole frames in raster order for the last {VIDEO} rows"),
        (
            {"video_indices": video[1:]},
            rf"^video_indices must name .* but they are {VIDEO - 1}, 18",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(model, inputs | changed)
    mask = torch.ones(1, 1, 1, len(positions), dtype=torch.bool)
    block = model.transformer_blocks[0].attn
    model._vsa_plan._set({0: model._vsa_plan._work(0, model._vsa_plan.family.layout(None, inputs))})
    with pytest.raises(ValueError, match=r"^attention_mask must be None for MiniMax-H3"):
        block(torch.randn(BATCH, len(positions), 32), None, mask)


@torch.no_grad()
def test_fused_projections_are_used() -> None:
    model, inputs = minimax_h3()
    dense = run(model, inputs)
    apply_vsa(model, topk=1.0)
    for block in model.transformer_blocks:
        block.attn.fuse_projections()
        nn.init.zeros_(block.attn.to_q.weight)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)


def test_context_parallelism_is_refused_where_rows_cannot_be_told() -> None:
    model, inputs = minimax_h3()
    plan = apply_vsa(model, topk=2)._vsa_plan
    with pytest.raises(NotImplementedError, match=r"other tokens stand beside the video"):
        plan._work(0, plan.family.layout(model.config, inputs), group=object())
    with pytest.raises(NotImplementedError, match=r"^group must be None for a MiniMaxH3"):
        apply_vsa(model, topk=2, group=object())


def pipeline(keyframes: int) -> tuple[Any, Any]:
    """diffusers' own blocks from the layout to the last step, without encoders and decoders."""
    blocks = modular_blocks_minimax_h3
    model, _ = minimax_h3(in_channels=24, audio_in_channels=32)
    step = blocks.MiniMaxH3FL2VACoreDenoiseStep if keyframes else blocks.MiniMaxH3CoreDenoiseStep
    pipe = step().init_pipeline()
    schedulers = {
        "scheduler": MiniMaxH3Scheduler(12.0),
        "audio_scheduler": MiniMaxH3Scheduler(3.0),
    }
    pipe.update_components(transformer=model, **schedulers)
    given = {
        "prompt_embeds": torch.randn(1, TEXT, 16),
        "text_token_tags": torch.ones(TEXT),
        "height": 64,
        "width": 96,
        "num_inference_steps": STEPS + 1,
    }
    if keyframes:
        given["keyframe_anchors"] = ("first", "last")
        given["condition_latents"] = [torch.randn(1, 24, 1, 4, 6) for _ in range(2)]

    def generate() -> tuple[Tensor, Tensor]:
        state = pipe(**given, generator=torch.Generator().manual_seed(0))
        return state.get("latents"), state.get("audio_latents")

    return model, generate


@torch.no_grad()
@pytest.mark.parametrize("keyframes", [0, 2])
def test_everything_kept_is_the_dense_pipeline_and_its_steps_are_counted(keyframes: int) -> None:
    """Keyframes keep a timestep of 0.999 at all steps, later than that of the video."""
    model, generate = pipeline(keyframes)
    dense = generate()
    seen: list[tuple[int, int]] = []

    def topk(layer: int, step: int) -> float | None:
        seen.append((layer, step))
        return 1.0 if step else None  # the first step is dense

    apply_vsa(model, topk=topk)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = generate()
    for new, old in zip(found, dense, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert dict.fromkeys(seen) == {
        (layer, step): None for step in range(STEPS) for layer in range(2)
    }
    apply_vsa(model, topk=1)
    assert (generate()[0] - dense[0]).abs().max() > 1e-4
