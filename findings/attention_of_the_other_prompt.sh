#!/usr/bin/env bash
# diffusers 0.42.1. Pyramid Attention Broadcast keeps one attention output for each layer and takes
# it again in the next call of that layer. Pipelines that guide by two calls of the transformer in
# each step (Wan's, under cache_context("cond") and ("uncond"), which other caches obey) so hand
# the negative prompt the attention of the positive one. With a skip range of 2 nothing is kept from
# step to step, and where cross-attention is broadcast both calls give the same bits: guidance of any
# scale is guidance by nothing. Without a word; it was made for pipelines that batch both prompts.
# Seen: both predictions are equal in all of four steps at a range of 2 and in three of four at 3, in
# one of them made of the negative prompt's attention; without the cache they differ by 14.5 in norm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import PyramidAttentionBroadcastConfig, WanTransformer3DModel

torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    ffn_dim=32, num_layers=2,
).eval()
torch.nn.init.normal_(model.proj_out.weight)
latents, positive, negative = torch.randn(1, 4, 3, 8, 8), *torch.randn(2, 1, 8, 16)


@torch.no_grad()
def guidance():
    """How far the two predictions of each step are apart, as Wan's pipeline calls for them."""
    norms = []
    for time in (700, 600, 500, 400):
        found = []
        for name, text in (("cond", positive), ("uncond", negative)):
            with model.cache_context(name):
                found.append(model(latents, torch.tensor([time]), text, return_dict=False)[0])
        norms.append(float((found[0] - found[1]).norm()))
    return norms


plain = guidance()
print(f"diffusers {diffusers.__version__}, |cond - uncond| in four steps")
print("  without a cache", plain)
seen = {}
for skip in (2, 3):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        cross_attention_block_skip_range=skip,
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    seen[skip] = guidance()
    model.disable_cache()
    print(f"  broadcast, skip range {skip}", seen[skip])
assert min(plain) > 1 and seen[2] == [0.0] * 4, "it has changed"
assert [x == 0 for x in seen[3]] == [True, False, True, True], "it has changed"
PYTHON
