# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers of families that came later."""

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
    rotated,
    wan,
)


def minimax_h3(
    grid: tuple[int, int, int] = GRID,
    keyframes: tuple[str, ...] = ("first", "last"),
    **config: int,
) -> Problem:
    """As the pipeline packs it: text, keyframes, audio, video."""
    T, H, W = grid
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=3,  # so that channels are left that are not rotated
        **{"in_channels": 4, "audio_in_channels": 4} | config,
    )
    from diffusers.modular_pipelines.minimax_h3 import before_denoise

    packed = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(TEXT), T, 2 * H, 2 * W, AUDIO, (1, 2, 2), 2, 2, 0, keyframes
    )
    positions, tags, video, audio, text, conditions, _ = packed
    plan = before_denoise.MiniMaxH3SetTimestepsStep.build_row_timesteps
    timestep, rows = plan(video, audio, conditions, 0, TEXT, 0.2, 0.5, 0.999, 1.0)
    return model, {
        "hidden_states": torch.randn(BATCH, len(video), 16),
        "audio_hidden_states": torch.randn(BATCH, len(audio), 4),
        "encoder_hidden_states": torch.randn(BATCH, len(text), 16),
        "timestep": timestep,
        "timestep_indices": rows,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


AUDIO = 9
"""MiniMax-H3's audio, of two channels, in rows for each."""


def chronoedit() -> Problem:
    _, inputs = wan()
    model = diffusers.ChronoEditTransformer3DModel(
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


def cosmos() -> Problem:
    T, H, W = GRID
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        mlp_ratio=1.0,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(32, 32, 32),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, 2 * H, 2 * W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "fps": 30,
    }


def kandinsky6(**config: Any) -> Problem:
    T, H, W = GRID
    model = diffusers.Kandinsky6Transformer3DModel(
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
        in_audio_dim=4,
        out_audio_dim=4,
        model_dim_a=24,
        axes_dims_a=(4, 4, 4),
        **{"visual_cond": False} | config,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "pooled_projections": torch.randn(BATCH, 8),
        "timestep": torch.full((BATCH,), 500.0),
        "audio_hidden_states": torch.randn(BATCH, 9, 4),
    }


def consisid() -> Problem:
    T, H, W = GRID
    _, inputs = cogvideox()
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2 * W,
        sample_height=2 * H,
        sample_frames=4 * T - 3,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    return model, inputs


def easyanimate() -> Problem:
    """The last block is of one stream."""
    T, H, W = GRID
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=2 * W,
        sample_height=2 * H,
        time_embed_dim=16,
        text_embed_dim=16,
        text_embed_dim_t5=None,
        num_layers=2,
        mmdit_layers=1,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, 2 * H, 2 * W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
    }


def anyflow() -> Problem:
    T, H, W = GRID
    model = diffusers.AnyFlowTransformer3DModel(
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
    return model, {
        "hidden_states": torch.randn(BATCH, T, 4, 2 * H, 2 * W),
        "timestep": torch.full((BATCH, T), 500.0),
        "r_timestep": torch.full((BATCH, T), 400.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
    }
