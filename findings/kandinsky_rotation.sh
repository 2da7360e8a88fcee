#!/usr/bin/env bash
# diffusers 0.42.1's Kandinsky 5 rounds queries and keys to bf16 after their rotation, whatever the
# model's type: the rotation is computed in fp32, cast to bf16 by name, and cast back. So a model in
# fp32, loaded to have a reference, computes its scores from 8 bits, and so does one in fp16, which
# has 11. Another implementation of its attention that keeps fp32 differs by a thousand times more
# than rounding in fp32 would explain. (Its forward pass with return_dict=False also gives a tensor
# where the other video transformers give a tuple: [0] of it is the first video.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers import transformer_kandinsky as source

torch.manual_seed(0)
model = Kandinsky5Transformer3DModel(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=48,
    ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(8, 8, 8),
)
seen = []
dispatch = source.dispatch_attention_fn


def spy(q, k, v, **more):
    seen.append([bool((x == x.bfloat16().float()).all()) for x in (q, k, v)])
    assert q.dtype == torch.float32
    return dispatch(q, k, v, **more)


source.dispatch_attention_fn = spy
with torch.no_grad():
    out = model(
        hidden_states=torch.randn(2, 3, 8, 8, 4), encoder_hidden_states=torch.randn(2, 5, 16),
        timestep=torch.tensor([500.0, 500.0]), pooled_projections=torch.randn(2, 8),
        visual_rope_pos=(torch.arange(3), torch.arange(4), torch.arange(4)),
        text_rope_pos=torch.arange(5), return_dict=False,
    )
print(f"diffusers {diffusers.__version__}, {next(model.parameters()).dtype}: are q, k, v bf16 numbers?")
for name, found in zip(("text", "video", "video to text"), seen, strict=True):
    print(f"  {name}: {found}")
assert seen == [[True, True, False], [True, True, False], [False, False, False]], "it has changed"
assert isinstance(out, torch.Tensor), "it has changed: a tuple"
PYTHON
