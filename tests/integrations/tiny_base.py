# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers: the first of the families, and what all of them share."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

HEADS, HEAD_DIM, TEXT, BATCH = 2, 24, 5, 2
GRID = (5, 6, 7)
Problem = tuple[nn.Module, dict[str, Any]]


def rotated() -> tuple[int, int, int]:
    """Channels of a head that positions along t, h and w rotate; all of them."""
    of_each = HEAD_DIM // 6 * 2
    return HEAD_DIM - 2 * of_each, of_each, of_each


def text_mask() -> Tensor:
    """Which text is real, in each of a batch."""
    return torch.tensor([[1] * TEXT, [1, 1, 1] + [0] * (TEXT - 3)])


def wan(grid: tuple[int, int, int] = GRID, **config: Any) -> Problem:
    T, H, W = grid
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        **{"num_layers": 2} | config,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, 2 * H, 2 * W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
    }


def wan_image_to_video() -> Problem:
    model, inputs = wan(image_dim=16, added_kv_proj_dim=HEADS * HEAD_DIM)
    inputs["encoder_hidden_states"] = torch.randn(BATCH, 512, 16)
    return model, {**inputs, "encoder_hidden_states_image": torch.randn(BATCH, 3, 16)}


def ltx(grid: tuple[int, int, int] = GRID) -> Problem:
    T, H, W = grid
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=2,
        caption_channels=16,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, T * H * W, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_attention_mask": text_mask(),
        "num_frames": T,
        "height": H,
        "width": W,
    }


def hunyuan(grid: tuple[int, int, int] = GRID) -> Problem:
    T, H, W = grid
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=rotated(),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, H, W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": torch.randn(BATCH, 8),
    }


def hunyuan15(grid: tuple[int, int, int] = GRID) -> Problem:
    T, H, W = grid
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=rotated(),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, H, W),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": torch.randn(BATCH, 3, 16),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "image_embeds": torch.randn(BATCH, 2, 16),
    }


def cogvideox(grid: tuple[int, int, int] = GRID) -> Problem:
    T, H, W = grid
    model = diffusers.CogVideoXTransformer3DModel(
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
    angles = torch.randn(T * H * W, HEAD_DIM // 2).repeat_interleave(2, dim=1)
    return model, {
        "hidden_states": torch.randn(BATCH, T, 4, 2 * H, 2 * W),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def mochi(grid: tuple[int, int, int] = GRID) -> Problem:
    T, H, W = grid
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    nn.init.normal_(model.pos_frequencies)
    return model, {
        "hidden_states": torch.randn(BATCH, 4, T, 2 * H, 2 * W),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_attention_mask": text_mask().bool(),
    }
