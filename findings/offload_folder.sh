#!/usr/bin/env bash
# diffusers 0.42.1. enable_group_offload(offload_to_disk_path=...) names its files by the place of the
# modules, and does not write a file that is there. So a second model of the same class in the same
# folder computes with the weights of the first, without a word: transformer_2 of Wan 2.2 by the
# pipeline's own enable_group_offload, which hands one folder to all components, or the next
# checkpoint in the folder of the last run. And save_pretrained, where weights are on a disk, writes
# whatever the empty memory in their place holds. Give every model and run an empty folder; save
# before.
# Seen, by blocks and by leaves: the second model's output is that of the first; what was saved is
# another model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1 accelerate==1.15.0
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
from diffusers import WanTransformer3DModel

torch.manual_seed(0)
small = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
x, time, text = torch.randn(1, 4, 3, 8, 8), torch.tensor([900]), torch.randn(1, 8, 16)


@torch.no_grad()
def run(model):
    return model(x, time, text, return_dict=False)[0]


def close(a, b):  # weights out of a file lie elsewhere in memory, which may round otherwise
    return torch.allclose(a, b, rtol=0, atol=1e-4)


for kind in ("block_level", "leaf_level"):
    pair = [
        WanTransformer3DModel(**small, text_dim=16, ffn_dim=32, num_layers=2).eval()
        for _ in range(2)
    ]
    first, second = map(run, pair)
    for model in pair:
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1,
            offload_to_disk_path=f"{sys.argv[1]}/{kind}",
        )
    found = [run(model) for model in pair]
    same = [close(found[0], first), close(found[1], second), close(found[1], first)]
    print(f"{kind}: the first is right: {same[0]}, the second: {same[1]}, it is the first: {same[2]}")
    assert same == [True, False, True], "it has changed"
    pair[0].save_pretrained(f"{sys.argv[1]}/saved_{kind}")
    saved = WanTransformer3DModel.from_pretrained(f"{sys.argv[1]}/saved_{kind}").state_dict()
    whole = {name: value.shape for name, value in pair[0].state_dict().items()}
    assert {name: value.shape for name, value in saved.items()} == whole
    again = WanTransformer3DModel.from_pretrained(f"{sys.argv[1]}/saved_{kind}").eval()
    right = close(run(again), first)
    print(f"{kind}: what was saved is the first: {right}")
    assert not right, "it has changed"
PYTHON
