# SPDX-License-Identifier: Apache-2.0
"""What diffusers' guiders do to layers: hooks that leave them out, or blur their queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.hooks import HookRegistry, LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from integrations.tiny_base import cogvideox, hunyuan, wan
from integrations.tiny_newer import consisid, cosmos, easyanimate
from integrations.tiny_transformers import run

from vsa.integrations.diffusers import apply_vsa

FINITE = 9999.0  # which diffusers 0.42.1 takes for infinite: findings/finite_blur.sh


def blur(model: Any, layer: int, stack: str) -> None:
    """Smoothed energy guidance: the queries of a layer are their mean."""
    config = SmoothedEnergyGuidanceConfig(indices=[layer], fqn=stack)
    _apply_smoothed_energy_guidance_hook(model, config, FINITE, name="guider")


def skip(model: Any, layer: int, stack: str) -> None:
    """Skip-layer guidance."""
    _apply_layer_skip_hook(model, LayerSkipConfig(indices=[layer], fqn=stack), name="guider")


BLURRED = {
    wan: "blocks",
    cogvideox: "transformer_blocks",
    consisid: "transformer_blocks",
    cosmos: "transformer_blocks",
    easyanimate: "transformer_blocks",
    hunyuan: "single_transformer_blocks",
}
SKIPPED = {wan: "blocks", cogvideox: "transformer_blocks"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "stack", "hook"),
    [(*each, blur) for each in BLURRED.items()] + [(*each, skip) for each in SKIPPED.items()],
)
def test_hooks_of_guiders_see_sparse_layers_as_they_see_dense_ones(
    family: Any, stack: str, hook: Any
) -> None:
    model, inputs = family()
    layer = len(getattr(model, stack)) - 1
    plain = run(model, inputs)
    hook(model, layer, stack)
    guided = run(model, inputs)
    assert (guided - plain).abs().max() > 1e-3
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs), guided, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(registry := getattr(module, "_diffusers_hook", None), HookRegistry):
            registry.remove_hook("guider", recurse=False)
    torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-4)
