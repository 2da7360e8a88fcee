# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers of every family that vsa.integrations.diffusers supports."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from integrations.tiny_base import (
    BATCH,
    GRID,
    HEAD_DIM,
    HEADS,
    TEXT,
    Problem,
    cogvideox,
    hunyuan,
    hunyuan15,
    ltx,
    mochi,
    rotated,
    text_mask,
    wan,
    wan_image_to_video,
)
from integrations.tiny_newer import (
    anyflow,
    chronoedit,
    consisid,
    cosmos,
    easyanimate,
    kandinsky6,
    minimax_h3,
)
from torch import Tensor, nn


def wan_vace() -> Problem:
    _, inputs = wan()
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        num_layers=1,
        vace_layers=[0],
        vace_in_channels=8,
    )
    _, _, T, H, W = inputs["hidden_states"].shape
    return model, {**inputs, "control_hidden_states": torch.randn(BATCH, 8, T, H, W)}


def wan_animate() -> Problem:
    T, H, W = GRID
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        num_layers=2,
        image_dim=None,
        inject_face_latents_blocks=2,
        motion_encoder_channel_sizes={"4": 4},
        motion_encoder_size=4,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 12, T, 2 * H, 2 * W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "pose_hidden_states": torch.randn(BATCH, 4, T - 1, 2 * H, 2 * W),
        "face_pixel_values": torch.randn(BATCH, 3, 4 * (T - 1) - 3, 4, 4),
    }


def ltx2(**config: Any) -> Problem:
    T, H, W = GRID
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=12,
        audio_cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
        **config,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, T * H * W, 4),
        "audio_hidden_states": torch.randn(BATCH, 9, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "audio_encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "sigma": torch.full((BATCH,), 500.0),
        "encoder_attention_mask": text_mask(),
        "audio_encoder_attention_mask": text_mask(),
        "num_frames": T,
        "height": H,
        "width": W,
        "audio_num_frames": 9,
    }


def ltx23(**config: Any) -> Problem:
    """As LTX-2.3: gates per head, prompts modulated, values in the place of attention on demand."""
    return ltx2(
        rope_type="split",
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        perturbed_attn=True,
        **config,
    )


def skyreels() -> Problem:
    _, inputs = wan()
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        num_layers=2,
    )
    return model, inputs


def in_blocks(model: Any, inputs: dict[str, Any], frames: int) -> dict[str, Any]:
    """Diffusion forcing: six frames, a timestep for each, and the model's mask over blocks."""
    model._set_ar_attention(frames)
    video = inputs["hidden_states"]
    return inputs | {
        "hidden_states": torch.randn(*video.shape[:2], 6, *video.shape[3:]),
        "timestep": torch.linspace(900, 400, 6).expand(BATCH, -1),
        "enable_diffusion_forcing": True,
    }


def kandinsky5() -> Problem:
    T, H, W = GRID
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=HEADS * HEAD_DIM,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=rotated(),
    )
    for name, parameter in model.named_parameters():  # which begin as zeros, so that blocks do not
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.2)
    return model, {
        "hidden_states": torch.randn(BATCH, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "pooled_projections": torch.randn(BATCH, 8),
        "visual_rope_pos": tuple(map(torch.arange, GRID)),
        "text_rope_pos": torch.arange(TEXT),
    }


def framepack() -> Problem:
    T, H, W = GRID
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=rotated(),
        image_proj_dim=16,
        has_image_proj=True,
        has_clean_x_embedder=True,
    )
    size = 2 * H, 2 * W
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, *size),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": torch.randn(BATCH, 8),
        "image_embeds": torch.randn(BATCH, 2, 16),
        "indices_latents": torch.arange(9, 9 + T),
        "latents_clean": torch.randn(BATCH, 4, 2, *size),
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": torch.randn(BATCH, 4, 2, *size),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": torch.randn(BATCH, 4, 3, *size),
        "indices_latents_history_4x": torch.arange(3),
    }


HISTORY = 2 * 6 * 7 + 1 * 3 * 4 + 1 * 2 * 2
"""Tokens of Framepack's earlier frames."""


FAMILIES = [
    *(wan, wan_image_to_video, ltx, hunyuan, hunyuan15, cogvideox, mochi),
    *(wan_vace, wan_animate, ltx2, ltx23, skyreels, kandinsky5, framepack),
    *(minimax_h3, chronoedit, cosmos, kandinsky6, consisid, easyanimate, anyflow),
]

SAME = (wan_animate, skyreels, ltx2, chronoedit, consisid)
UNLIKE = [family for family in FAMILIES if family not in SAME]
"""Without those whose attention is computed by lines that another one runs too, for slow tests."""


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs, return_dict=False)
    return out[0] if isinstance(out, tuple) else out  # Kandinsky's is no tuple
