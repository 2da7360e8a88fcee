#!/usr/bin/env bash
# diffusers 0.42.1. model.set_attention_backend(name) says that the model's attention runs on that
# backend. For CogVideoX, Mochi and EasyAnimate it does nothing: their processors have no place for
# it, are passed over, and call PyTorch themselves; the only word is that backends are experimental.
# It changes other models instead: the call makes the name the default of the whole process, which a
# Wan beside it that nobody asked for anything runs on from then on. So who measures CogVideoX on two
# backends measures one of them twice, and another model of the program changes its numbers.
# Seen: 0 of CogVideoX's attentions on the backend that it was given, and all 2 of a Wan's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.models import attention_dispatch

torch.manual_seed(0)
asked = CogVideoXTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, time_embed_dim=8,
    text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
    max_text_seq_length=5,
)
other = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    ffn_dim=32, num_layers=1,
)
runs = {
    "CogVideoX, which is given a backend": lambda: asked(
        torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([500.0])
    ),
    "Wan, which is given nothing": lambda: other(
        torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 16)
    ),
}
name = attention_dispatch.AttentionBackendName._NATIVE_MATH
backends = attention_dispatch._AttentionBackendRegistry._backends
theirs, calls = backends[name], []
backends[name] = lambda *args, **keywords: (calls.append(1), theirs(*args, **keywords))[1]


@torch.no_grad()
def count():
    """Calls of the backend in a forward pass of each model."""
    found = {}
    for model, run in runs.items():
        calls.clear()
        run()
        found[model] = len(calls)
    return found


before = count()
asked.set_attention_backend(name.value)
after = count()
print(f"diffusers {diffusers.__version__}, attentions on {name.value!r}")
for model in runs:
    print(f"  {model}: {before[model]} before, {after[model]} after")
assert [*before.values(), *after.values()] == [0, 0, 0, 2], "it has changed"
PYTHON
