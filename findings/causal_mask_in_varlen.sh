#!/usr/bin/env bash
# diffusers 0.42.1. Backends for sequences of varying length ("flash_varlen", "sage_varlen", those of
# FlashAttention-3 and of the hub) make of any mask how many keys some query may see, and take so
# many from the front. A causal mask over blocks of frames, SkyReels-V2's in diffusion forcing, is so
# no mask at all: its videos are made with attention to the future, without a word. Of keys that are
# padded on the left the padding is attended, and as many of the last tokens are not. "native" and
# "flex" honour the mask.
# Seen on a CPU, where a few lines of PyTorch stand for flash_attn's function, which takes no mask
# anyway: the first frames of SkyReels-V2 depend on the last ones, by "native" they do not; a mask
# that leaves out the first two of six keys leaves out the last two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.models import attention_dispatch
from torch.nn.functional import scaled_dot_product_attention

torch.set_grad_enabled(False)
torch.manual_seed(0)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
    """Attention of each sequence, (tokens of all, heads, head_dim), as flash_attn documents it."""
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        of_queries, of_keys = (slice(*x[i : i + 2]) for x in (cu_seqlens_q, cu_seqlens_k))
        one = (x[at].transpose(0, 1) for x, at in ((q, of_queries), (k, of_keys), (v, of_keys)))
        found.append(scaled_dot_product_attention(*one, scale=softmax_scale).transpose(0, 1))
    return torch.cat(found)


attention_dispatch.flash_attn_varlen_func = varlen

model = SkyReelsV2Transformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, num_layers=2,
).eval()
model._set_ar_attention(2)  # as the pipeline does: causal over blocks of two frames
video, text = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 8, 16)
other = video.clone()
other[:, :, 2:] += 1


def first_frames(x):
    return model(x, torch.tensor([900]), text, return_dict=False)[0][:, :, :2]


depends = {}
for backend in ("native", "flash_varlen"):
    name = attention_dispatch.AttentionBackendName(backend)
    for block in model.blocks:  # what set_attention_backend() does where flash_attn is installed
        block.attn1.processor._attention_backend = name
    changed = (first_frames(video) - first_frames(other)).abs().max().item()
    depends[name.value] = changed > 1e-3
    print(f"{name.value}: the first two frames change by {changed:.4f} with the last two")
assert depends == {"native": False, "flash_varlen": True}, "it has changed"

x = torch.randn(1, 6, 2, 24)
mask = torch.tensor([False, False, True, True, True, True])[None, None, None]
attention = attention_dispatch.dispatch_attention_fn
found = attention(x, x, x, attn_mask=mask, backend="flash_varlen")
of_last, of_first = (attention(x, k, k, backend="native") for k in (x[:, 2:], x[:, :4]))
same = [torch.allclose(found, expected, atol=1e-5) for expected in (of_last, of_first)]
print(f"keys 2 to 5 are real: attends those: {same[0]}, attends 0 to 3: {same[1]}")
assert same == [False, True], "it has changed"
PYTHON
