# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of diffusers around tiny transformers: their loops, grids and counted steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from integrations.tiny_newer import cosmos, kandinsky6
from integrations.tiny_transformers import TEXT, kandinsky5, ltx23, skyreels, wan

from vsa.integrations.diffusers import apply_vsa, count_steps

STEPS = 3
Pipeline = tuple[nn.Module, Callable[..., Tensor]]


class Stub(SimpleNamespace):
    """What a pipeline reads of a part that does not run; it must be of a class with a module."""


def embeddings(*names: str, width: int = 16) -> dict[str, Tensor]:
    return {name: torch.randn(1, TEXT, width) for name in names}


def of_wan(model: nn.Module, name: str) -> Pipeline:
    pipe = getattr(diffusers, name)(
        tokenizer=None,
        text_encoder=None,
        transformer=model,
        vae=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )
    text = embeddings("prompt_embeds", "negative_prompt_embeds")
    size = {"height": 96, "width": 128, "num_frames": 17}
    return model, lambda **more: pipe(**text, **size, **more).frames


def of_kandinsky() -> Pipeline:
    model, _ = kandinsky5()
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    text = embeddings("prompt_embeds_qwen", "negative_prompt_embeds_qwen")
    for kind in ("prompt", "negative_prompt"):
        text[f"{kind}_embeds_clip"] = torch.randn(1, 8)
        text[f"{kind}_cu_seqlens"] = torch.tensor([0, TEXT], dtype=torch.int32)
    size = {"height": 128, "width": 128, "num_frames": 17}
    return model, lambda **more: pipe(**text, **size, **more).frames


def of_ltx2() -> Pipeline:
    model, _ = ltx23(use_prompt_embeddings=False)
    one = torch.ones(1)
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    sizes = {"mel_bins": 8, "latent_channels": 2, "sample_rate": 16000, "mel_hop_length": 160}
    pipe = diffusers.LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=Stub(
            **ratios, latents_mean=one, latents_std=one, config=SimpleNamespace(scaling_factor=1.0)
        ),
        audio_vae=Stub(
            mel_compression_ratio=4,
            temporal_compression_ratio=4,
            latents_mean=one,
            latents_std=one,
            config=SimpleNamespace(**sizes),
        ),
        text_encoder=None,
        tokenizer=None,
        connectors=lambda text, mask, **_: (text, text[..., :24], mask),
        transformer=model,
        vocoder=None,
    )
    text = embeddings("prompt_embeds", "negative_prompt_embeds", width=48)
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, TEXT) for name in text}
    size = {"height": 6 * 32, "width": 7 * 32, "num_frames": 33}
    more = {**text, **masks, **size, "spatio_temporal_guidance_blocks": [1]}
    return model, lambda **given: pipe(**more, **given).frames


def of_kandinsky6(image: Tensor | None) -> Pipeline:
    """With an image, a frame of it follows the video in the transformer's input."""
    model, _ = kandinsky6(visual_cond=True, visual_token_type_num_embeddings=2)
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        transformer=model,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.encode_image = lambda *_: image
    text = embeddings("prompt_embeds", "negative_prompt_embeds")
    text |= embeddings("pooled_prompt_embeds", "negative_pooled_prompt_embeds", width=8)
    text = {name: x[:, 0] if "pooled" in name else x for name, x in text.items()}
    size = {"height": 128, "width": 128, "num_frames": 17, "sample_audio": False}
    if image is not None:
        size["image"] = object()  # which encode_image is asked about
    return model, lambda **more: pipe(**text, **size, **more).frames


def of_cosmos() -> Pipeline:
    """Its timesteps are log(sigma) / 4, from 1.1 down below 0."""
    model, _ = cosmos()
    pipe = diffusers.CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        vae=None,
        scheduler=diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        safety_checker=Stub(to=lambda device: None, check_text_safety=lambda text: True),
    )
    text = embeddings("prompt_embeds", "negative_prompt_embeds")
    size = {"height": 96, "width": 112, "num_frames": 33, "guidance_scale": 2.0}
    return model, lambda **more: pipe(**text, **size, **more).frames


PIPELINES = {
    "Wan": lambda: of_wan(wan()[0], "WanPipeline"),
    "SkyReels-V2": lambda: of_wan(skyreels()[0], "SkyReelsV2Pipeline"),
    "Kandinsky 5": of_kandinsky,
    "LTX-2.3": of_ltx2,
    "Cosmos": of_cosmos,
    "Kandinsky 6": lambda: of_kandinsky6(None),
    "Kandinsky 6, with an image": lambda: of_kandinsky6(torch.randn(1, 16, 16, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_everything_kept_is_the_dense_pipeline_and_its_steps_are_counted(name: str) -> None:
    model, generate = PIPELINES[name]()

    def run(**more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        steps = {"num_inference_steps": STEPS, "output_type": "latent"}
        return torch.as_tensor(generate(generator=generator, **steps, **more))

    dense = run()
    seen: list[tuple[int, int]] = []

    def topk(layer: int, step: int) -> float | None:
        seen.append((layer, step))
        return 1.0 if step else None  # the first step is dense

    apply_vsa(model, topk=topk)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = run()
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    assert dict.fromkeys(seen) == {
        (layer, step): None for step in range(STEPS) for layer in range(2)
    }
    seen.clear()
    run(callback_on_step_end=count_steps)
    assert list(dict.fromkeys(step for _, step in seen)) == list(range(STEPS))
    apply_vsa(model, topk=1, tile=(2, 3, 4))
    assert (run() - dense).abs().max() > 1e-4


@torch.no_grad()
def test_skyreels_diffusion_forcing_in_blocks() -> None:
    """Blocks of frames lag behind each other, and the pipeline puts the mask over them itself."""
    model, _ = skyreels()
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=model,
        vae=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )
    text = embeddings("prompt_embeds", "negative_prompt_embeds")
    size = {"height": 32, "width": 48, "num_frames": 21, "base_num_frames": 21}
    blocks = {"causal_block_size": 2, "ar_step": 2, "num_inference_steps": 2}

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {**text, **size, **blocks, "generator": generator, "output_type": "latent"}
        # prompt has no default here (diffusers 0.42.1), though prompt_embeds may stand for it.
        return torch.as_tensor(pipe(prompt=None, **options).frames)

    dense = run()
    assert model.config.num_frame_per_block == 2
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(), dense, rtol=1e-4, atol=1e-4)
    apply_vsa(model, topk=1, tile=(2, 1, 2))
    assert (run() - dense).abs().max() > 1e-3
