#!/usr/bin/env bash
# PyTorch 2.13.0, FSDP2. fully_shard with MixedPrecisionPolicy(param_dtype=torch.bfloat16) casts the
# floating-point arguments of every sharded module too (cast_forward_inputs=True by default), not
# only activations: a video transformer sharded block by block gets its rotations, fp32 in diffusers,
# in bf16, and its timesteps as well, of which 1,000 become 506 numbers. The same model in
# bf16 without FSDP keeps both. So training on several GPUs optimises for other times than it
# draws, and other positions than inference uses. (torchtitan switched it off for its language models
# in pytorch/torchtitan#2881, for the rotations.) Seen with diffusers 0.42.1's Wan on one process: of
# the times from 996 to 1000 two are told apart; with cast_forward_inputs=False, latents and text cast
# by hand, all five are, and rotations are fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import tempfile

import diffusers
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
half = torch.bfloat16
x, text = torch.randn(1, 4, 3, 8, 8).to(half), torch.randn(1, 8, 16).to(half)


def sharded(cast):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        ffn_dim=32, num_layers=2,
    ).eval()
    policy = MixedPrecisionPolicy(param_dtype=half, cast_forward_inputs=cast)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def look(model):
    """The type of the rotations in a block, and how many of five times are told apart."""
    types = set()
    handle = model.blocks[0].attn1.register_forward_pre_hook(
        lambda module, args: types.update(table.dtype for table in args[3])
    )
    times = [torch.tensor([time]) for time in (1000.0, 999.0, 998.0, 997.0, 996.0)]
    outs = [model(x, time, text, return_dict=False)[0] for time in times]
    handle.remove()
    return types, len({out.float().numpy().tobytes() for out in outs})


print(f"torch {torch.__version__}, diffusers {diffusers.__version__}")
print("1,000 times in bf16:", len(torch.arange(1.0, 1001.0).to(half).unique()))
found = {cast: look(sharded(cast)) for cast in (True, False)}
for cast, (types, times) in found.items():
    print(f"cast_forward_inputs={cast}: rotations {types}, {times} of 5 times told apart")
assert found[True] == ({half}, 2), "it has changed"
assert found[False] == ({torch.float32}, 5), "it has changed"
dist.destroy_process_group()
PYTHON
