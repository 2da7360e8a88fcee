#!/usr/bin/env bash
# diffusers 0.42.1. TaylorSeerCacheConfig() with its defaults caches nothing in Wan, LTX, CogVideoX and
# Mochi: its patterns ("^blocks.*attn") are matched against whole names of modules, and the attention
# of these is called attn1. enable_cache accepts it, says that a cache is on, and every step is
# computed in full. HunyuanVideo's layers are called attn, and are found. Name them:
# cache_identifiers=[r".*\.attn1"].
# Seen: 0 hooks and the bits of the model without a cache for Wan, LTX, CogVideoX and Mochi, 2 of 2
# layers in HunyuanVideo; with the names said 2 in Wan, and another output.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import TaylorSeerCacheConfig

torch.manual_seed(0)
small = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
more = {
    "WanTransformer3DModel": {"text_dim": 16, "ffn_dim": 32},
    "LTXVideoTransformer3DModel": {"cross_attention_dim": 48, "caption_channels": 16},
    "CogVideoXTransformer3DModel": {"text_embed_dim": 16, "sample_width": 8, "sample_height": 8},
    "MochiTransformer3DModel": {"text_embed_dim": 16, "pooled_projection_dim": 16},
    "HunyuanVideoTransformer3DModel": {
        "num_single_layers": 0, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16,
        "pooled_projection_dim": 8, "rope_axes_dim": (8, 8, 8),
    },
}


def hooked(model):
    """The modules that the cache has found."""
    registries = ((name, getattr(m, "_diffusers_hook", None)) for name, m in model.named_modules())
    return [name for name, found in registries if found and "taylorseer_cache" in found.hooks]


found = {}
for name, config in more.items():
    model = getattr(diffusers, name)(**small, **config, num_layers=2)
    model.enable_cache(TaylorSeerCacheConfig())
    assert model.is_cache_enabled
    found[name] = hooked(model)
    print(f"{name}: {found[name] or 'no layer'}")
assert [len(each) for each in found.values()] == [0, 0, 0, 0, 2], "it has changed"

wan = diffusers.WanTransformer3DModel(**small, **more["WanTransformer3DModel"], num_layers=2).eval()
torch.nn.init.normal_(wan.proj_out.weight)
x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 8, 16)


@torch.no_grad()
def steps():
    outs = []
    for step in range(5):
        with wan.cache_context("cond"):
            outs.append(wan(x + step, torch.tensor([900 - step]), text, return_dict=False)[0])
    return torch.stack(outs)


plain = steps()
same = {}
for names in (None, [r".*\.attn1"]):
    wan.enable_cache(TaylorSeerCacheConfig(cache_identifiers=names))
    same[names is None] = torch.equal(steps(), plain)
    print(f"cache_identifiers={names}: {len(hooked(wan))} layers, the bits of no cache: {same[names is None]}")
    wan.disable_cache()
assert same == {True: True, False: False}, "it has changed"
PYTHON
