#!/usr/bin/env bash
# diffusers 0.42.1. seg_blur_sigma of SmoothedEnergyGuidance says how far the queries of the guiding
# pass are blurred; above 9999 it stands for infinite blur, one mean for all tokens. The two
# branches are the wrong way round: every finite sigma, however small, makes all queries one mean,
# and "infinite" is the Gaussian kernel, which leaves a little of the difference. So sigma has no
# effect at all below that limit, and the weakest guidance that can be asked for is the strongest.
# (Tokens are taken for a square picture, as its own text says, whatever the video's grid is.)
# Seen: for sigma 0.01, 1 and 100 the queries of 256 tokens have a spread of 0, for 1e7 a tenth of
# what it was; the outputs of the model are the same bits for all finite sigmas.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import SmoothedEnergyGuidance, WanTransformer3DModel
from diffusers.hooks import HookRegistry, SmoothedEnergyGuidanceConfig
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook

torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    ffn_dim=32, num_layers=2,
).eval()
query = model.blocks[1].attn1.to_q
spreads = {}
x, text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 8, 16)  # 4 frames of 8 x 8 tokens


@torch.no_grad()
def run(sigma):
    blur = SmoothedEnergyGuidanceConfig(indices=[1], fqn="blocks")
    if sigma is not None:
        _apply_smoothed_energy_guidance_hook(model, blur, sigma, name="blur")
    seen = []
    handle = query.register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(x, torch.tensor([500]), text, return_dict=False)[0]
    handle.remove()
    HookRegistry.check_if_exists_or_initialize(query).remove_hook("blur", recurse=False)
    spreads[sigma] = float(seen[0].std(dim=1).max())
    return out


outs = {sigma: run(sigma) for sigma in (None, 0.01, 1.0, 100.0, 1e7)}
print(f"diffusers {diffusers.__version__}")
for sigma, spread in spreads.items():
    print(f"sigma {sigma}: queries spread by {spread:.1e} of {spreads[None]:.1e}")
finite = [outs[sigma] for sigma in (0.01, 1.0, 100.0)]
assert all(torch.equal(out, finite[0]) for out in finite), "it has changed: sigma has an effect"
assert all(spreads[sigma] < 1e-6 for sigma in (0.01, 1.0, 100.0)), "it has changed"
assert spreads[1e7] > 0.01 * spreads[None], "it has changed: infinite blur is one mean"
assert SmoothedEnergyGuidance(seg_guidance_layers=[1]).seg_blur_sigma > 9999, "it has changed: the default is finite"
PYTHON
