#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU. FlopCounterMode counts 0 for scaled_dot_product_attention and 0 for its
# backward: the fused kernel has no formula, and what has none counts as nothing, without a word. On
# meta tensors, and with the unfused kernel, the same call counts what it should. So a dense model
# that is counted on a CPU looks cheaper than a sparse one whose operators have formulas. In
# nn.MultiheadAttention the count also depends on the mode: attention is left out in training, and
# in inference its four projections too. (Reported upstream as pytorch/pytorch#195460.)
# Seen, of the attention's own FLOPs: forward 0 and backward 0 on a CPU, 1 and 2 on meta tensors, 1
# unfused; a module of 512 tokens and 128 channels counts 1.5 with weights returned, 0.5 in training
# without, 0 in inference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

HEADS, TOKENS, CHANNELS = 2, 512, 64
ATTENTION = 4 * HEADS * TOKENS * TOKENS * CHANNELS


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops() / ATTENTION, result


def both(device):
    q, k, v = (
        torch.randn(1, HEADS, TOKENS, CHANNELS, device=device, requires_grad=True) for _ in "qkv"
    )
    forward, out = counted(lambda: scaled_dot_product_attention(q, k, v))
    backward, _ = counted(lambda: out.sum().backward())
    return forward, backward


print(torch.__version__, "cpu", both("cpu"), "meta", both("meta"))
assert both("cpu") == (0, 0) and both("meta") == (1, 2), "it has changed"
with sdpa_kernel(SDPBackend.MATH):
    assert both("cpu") == (1, 2), "it has changed"

layer = torch.nn.MultiheadAttention(HEADS * CHANNELS, HEADS, batch_first=True)
x = torch.randn(1, TOKENS, HEADS * CHANNELS)
with_weights, _ = counted(lambda: layer(x, x, x, need_weights=True))
training, _ = counted(lambda: layer(x, x, x, need_weights=False))
layer.eval()
with torch.no_grad():
    inference, _ = counted(lambda: layer(x, x, x, need_weights=False))
print("module: with weights", with_weights, "training", training, "inference", inference)
assert (with_weights, training, inference) == (1.5, 0.5, 0), "it has changed"
PYTHON
