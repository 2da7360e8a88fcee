# SPDX-License-Identifier: Apache-2.0
"""Caches of diffusers, which leave layers out of some steps, around sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from integrations.tiny_transformers import BATCH, hunyuan, run, wan

from vsa.integrations.diffusers import apply_vsa, processors, remove_vsa

STEPS = 7


def broadcast(skip_range: int) -> PyramidAttentionBroadcastConfig:
    """Every layer's attention is computed in one step of so many, and taken again in the others."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip_range, current_timestep_callback=lambda: 500
    )


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.3),
    "broadcast": lambda: broadcast(2),
    "magnitude": lambda: MagCacheConfig(
        mag_ratios=[0.99] * STEPS, num_inference_steps=STEPS, threshold=0.3, max_skip_steps=2
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 1000),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1000),
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: 500,
    ),
    "Taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        max_order=1,
        cache_identifiers=[r".*\.attn1?"],  # by default it finds no layer of Wan
    ),
}


WRONG = hunyuan, "faster"


@torch.no_grad()
def denoise(model: Any, inputs: dict[str, Any], steps: int = STEPS) -> list[Tensor]:
    """What the model says in each step of a short loop."""
    x, outs = inputs["hidden_states"], []
    for step in range(steps):
        timestep = torch.full((BATCH,), 900.0 - 100 * step)
        with model.cache_context("cond"):
            outs.append(run(model, {**inputs, "hidden_states": x, "timestep": timestep}))
        x = x - 0.1 * outs[-1]
    return outs


@pytest.mark.parametrize(
    ("family", "kind"),
    # FasterCache finds the wrong sizes in HunyuanVideo's joint attention, sparse or not.
    [(family, kind) for family in (wan, hunyuan) for kind in CACHES if (family, kind) != WRONG],
)
def test_a_cache_leaves_out_of_the_sparse_model_what_it_leaves_out_of_the_dense(
    family: Any, kind: str
) -> None:
    model, inputs = family()
    model.eval()
    plain = denoise(model, inputs)
    apply_vsa(model, topk=1.0)
    model.enable_cache(CACHES[kind]())
    sparse = denoise(model, inputs)
    model.disable_cache()
    remove_vsa(model).enable_cache(CACHES[kind]())
    dense = denoise(model, inputs)
    torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-4)
    assert max((a - b).abs().max() for a, b in zip(dense, plain, strict=True)) > 1e-3
    model.disable_cache()
    model.enable_cache(CACHES[kind]())
    cached_first = denoise(apply_vsa(model, topk=1.0), inputs)
    torch.testing.assert_close(cached_first, dense, rtol=1e-3, atol=1e-4)


def test_selections_are_no_older_than_the_last_refresh_where_a_cache_skipped_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers 0.42.1, hooks/pyramid_attention_broadcast.py: a skipped layer is not called at all.

    Attention runs in steps 0, 2, 4 and 6. Step 3, which is to choose anew, is left out, so that
    step 4 has to choose: what step 0 chose is of an earlier span of three steps.
    """
    model, inputs = wan(num_layers=1)
    chose: list[bool] = []
    attention = processors.attention

    def spy(*args: Any, selection: Any = None, **more: Any) -> Any:
        chose.append(selection is None)
        return attention(*args, selection=selection, **more)

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa(model, topk=0.3, refresh_every=3)
    model.enable_cache(broadcast(2))
    denoise(model.eval(), inputs)
    assert chose == [True, False, True, True]
