# SPDX-License-Identifier: Apache-2.0
"""What processes of test_distributed.py do with text that every rank holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed.distributed_jobs import GRID, TEXT, refused
from torch.distributed.device_mesh import init_device_mesh

import vsa
from vsa.distributed import ulysses_attention
from vsa.distributed.text import parted

BEFORE, AFTER = (vsa.Grid((5, 6, 7), (2, 3, 4), **{side: 5}) for side in ("prefix", "suffix"))
CLOSE = {"rtol": 0, "atol": 1e-11}


def agree(grid, rank, ranks, kv_heads=4, lengths=None, gated=True, head_groups=None, **options):
    """One process against all: out, log-sum-exp and gradients, those of the text in parts."""
    torch.manual_seed(4)
    heads = [4, kv_heads, kv_heads, *[4] * gated]
    whole = [torch.randn(2, grid.length, n, 8, dtype=torch.float64) for n in heads]
    upstream = torch.randn(2, grid.length, 4, 8, dtype=torch.float64)
    counts = lengths or [len(part) for part in torch.arange(grid.tokens).tensor_split(ranks)]

    def mine(x):
        prefix, video, suffix = parted(x, grid)
        return torch.cat([prefix, video.split(counts, dim=1)[rank], suffix], dim=1)

    sharded = {"text": "replicated", "lengths": lengths, "head_groups": head_groups}
    results, leaves = [], []
    for attend, xs, more in (
        (vsa.attention, whole, {}),
        (ulysses_attention, map(mine, whole), sharded),
    ):
        q, k, v, *gate = own = [x.clone().requires_grad_() for x in xs]
        leaves.append(own)
        given = {"grid": grid, "topk": 3, "return_lse": True, **options, **more}
        results.append(attend(q, k, v, gate_coarse=gate[0] if gate else None, **given))
    (expected, lse), (out, own_lse) = results
    torch.testing.assert_close(out, mine(expected), **CLOSE)
    torch.testing.assert_close(own_lse, mine(lse.mT).mT, **CLOSE)

    (expected * upstream).sum().backward()
    # Every rank's loss has its own part of the video; an equal share of that of the text.
    prefix, video, suffix = parted(mine(upstream), grid)
    weights = torch.cat([prefix / ranks, video, suffix / ranks], dim=1)
    (out * weights).sum().backward()
    for x, y in zip(*leaves, strict=True):
        prefix, video, suffix = parted(y.grad, grid)
        text = torch.cat([prefix, suffix], dim=1)
        dist.all_reduce(text)
        prefix, suffix = text.split([grid.prefix, grid.suffix], dim=1)
        torch.testing.assert_close(torch.cat([prefix, video, suffix], dim=1), mine(x.grad), **CLOSE)


def compiled(rank, options):
    x = torch.randn(1, options["lengths"][rank] + 5, 4, 8)
    attend = torch.compile(
        lambda x: ulysses_attention(x, x, x, 2, **options), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(attend(x), ulysses_attention(x, x, x, 2, **options))


def replicated(rank):
    ranks = dist.get_world_size()
    valid = torch.arange(28).view(2, 14) % 3 > 0
    agree(BEFORE, rank, ranks)
    agree(AFTER, rank, ranks, kv_heads=1, lengths=[60, *[150 // (ranks - 1)] * (ranks - 1)])
    agree(TEXT, rank, ranks, kv_heads=2, text_valid=valid, topk=(1, 3, 0.5, 1.0))
    agree(GRID, rank, ranks, gated=False)

    x = torch.randn(1, len(torch.arange(210).tensor_split(ranks)[rank]) + 5, 4, 8)
    plain = {"grid": AFTER, "text": "replicated"}
    if ranks == 2:  # of shards as uneven as four ranks have
        compiled(rank, plain | {"lengths": [100, 110]})
    own = dict.fromkeys("qkv", x)
    refused('text must be "sharded" or "replicated"', **own, **(plain | {"text": "here"}))
    refused(f"q has {x.shape[1]} tokens on rank {rank}", **own, **(plain | {"grid": TEXT}))
    refused("lengths must be", **own, **plain, lengths=[215 - ranks + 1, *[1] * (ranks - 1)])
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        refused('text must be "sharded" on a 2-D group', **own, **plain, group=mesh)
    with pytest.raises(ValueError, match="cannot share out evenly"):
        ulysses_attention(*[x[:, :, :3]] * 3, 2, **plain)
