# SPDX-License-Identifier: Apache-2.0
"""A video's tokens on several processes, attention as if on one.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/ulysses.py
"""

import torch
import torch.distributed as dist

import vsa
from vsa.distributed import ulysses_attention

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same video everywhere, so that one process can check the others
grid = vsa.Grid((5, 8, 10), prefix=7)  # 7 text tokens, then 5 frames of 8x10
q, k, v = torch.randn(3, 1, grid.length, 4, 32).unbind()

# what a sequence-parallel model holds on this rank
shards = [x.tensor_split(ranks, dim=1)[rank].clone().requires_grad_() for x in (q, k, v)]
out = ulysses_attention(*shards, 4, grid=grid)
out.square().sum().backward()

alone = vsa.attention(q, k, v, 4, grid=grid).tensor_split(ranks, dim=1)[rank]
error = (out - alone).abs().max().item()
# in one write, as lines of several processes would run into each other
line = f"rank {rank}: {out.shape[1]} of {grid.length} tokens, error {error:.1e}\n"
print(line, end="", flush=True)
dist.destroy_process_group()
