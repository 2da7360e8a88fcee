# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py do: a module that they can import themselves."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import vsa
from vsa.distributed import ulysses_attention

GRID = vsa.Grid((5, 6, 7), tile=(2, 3, 4))
TEXT = vsa.Grid((5, 6, 7), tile=(2, 3, 4), prefix=5, suffix=9)
PER_HEAD, PER_TOKEN = (4, 1), (1, -1, 1, 1)
FULL = (2, -1, 4, 8)
PER_HEAD_MASK = torch.arange(4 * 12 * 12).view(4, 12, 12) % 5 > 1

# grid, kv_grid, key heads, shapes of gate_coarse and gate_fine, what else to pass
PROBLEMS = {
    "plain": (GRID, None, 4, None, None, {}),
    "gates": (GRID, None, 4, FULL, PER_HEAD, {}),
    "gates of other kinds": (GRID, None, 2, PER_TOKEN, (1, 1, 4, 8), {"return_lse": True}),
    "text": (TEXT, None, 1, FULL, FULL, {"scale": 0.3, "return_lse": True}),
    "keys": (GRID, vsa.Grid((3, 6, 7), tile=(2, 3, 4)), 2, FULL, None, {}),
    "runs": (GRID, None, 2, FULL, None, {"score": vsa.SubBlocks(4)}),
    "heads": (GRID, None, 4, PER_HEAD, None, {"topk": (1, 3, 0.5, 1.0)}),
    "tail": (TEXT, None, 2, FULL, None, {"tail": True, "return_lse": True}),
    "mask": (GRID, None, 2, FULL, None, {"mask": vsa.masks.ChunkCausal(2), "topk": 0.6}),
    "mask of heads": (GRID, None, 4, FULL, FULL, {"mask": PER_HEAD_MASK, "tail": True}),
    "budget of a layer": (GRID, None, 4, None, None, {"topk": vsa.LayerBudget((1, 3, 6, 12), 12)}),
}


def bounds(lengths):
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def agree(name, group, rank, ranks, lengths=None, default=None, batch=2, head_groups=None, **more):
    """The problem on one process and on all: outputs and gradients of this rank's tokens."""
    torch.manual_seed(1)
    grid, kv_grid, kv_heads, coarse, fine, options = PROBLEMS[name]
    options = {"topk": 3, **options, **more}
    key_length = (kv_grid or grid).length
    shapes = [(batch, grid.length, 4, 8), *[(batch, key_length, kv_heads, 8)] * 2]
    shapes += [
        shape and tuple({-1: grid.length, 2: batch}.get(n, n) for n in shape)
        for shape in (coarse, fine)
    ]
    xs = [None if s is None else torch.randn(s, dtype=torch.float64) for s in shapes]

    def split(x, counts):
        at = bounds(counts)
        return x[:, at[rank] : at[rank + 1]]

    given, lengths = lengths, lengths or default
    lengths = lengths or [len(part) for part in torch.arange(grid.length).tensor_split(ranks)]
    kv_lengths = lengths
    if kv_grid:
        kv_lengths = [len(part) for part in torch.arange(key_length).tensor_split(ranks)]

    def mine(x, counts):
        sharded = x.ndim == 4 and x.shape[1] > 1
        return split(x, counts) if sharded else x

    counts = [lengths, kv_lengths, kv_lengths, lengths, lengths]
    whole = [None if x is None else x.clone().requires_grad_() for x in xs]
    # strided on purpose: heads before tokens in memory
    parts = [
        None
        if x is None
        else mine(x, n).transpose(-3, -2).contiguous().transpose(-3, -2)
        if x.ndim == 4
        else x.clone()
        for x, n in zip(xs, counts, strict=True)
    ]
    parts = [None if x is None else x.detach().requires_grad_() for x in parts]
    results = []
    for q, k, v, gate_coarse, gate_fine in (whole, parts):
        extra = {"gate_coarse": gate_coarse, "gate_fine": gate_fine, "kv_grid": kv_grid}
        if q is parts[0]:
            extra |= {"lengths": given, "group": group, "head_groups": head_groups}
            got = ulysses_attention(q, k, v, grid=grid, **extra, **options)
        else:
            got = vsa.attention(q, k, v, grid=grid, **extra, **options)
        results.append(got if isinstance(got, tuple) else (got,))
    weights = [torch.randn_like(x) for x in results[0]]
    close = torch.testing.assert_close
    at = bounds(lengths)
    here = slice(at[rank], at[rank + 1])
    cuts = [(slice(None), here), (slice(None), slice(None), here)]
    sum((x * w).sum() for x, w in zip(results[0], weights, strict=True)).backward()
    sum((x * w[c]).sum() for x, w, c in zip(results[1], weights, cuts, strict=False)).backward()
    for x, y, c in zip(*results, cuts, strict=False):
        close(y, x[c], rtol=0, atol=1e-12)
    for x, y, n in zip(whole, parts, counts, strict=True):
        if x is None:
            continue
        expected, grad = mine(x.grad, n), y.grad.clone()
        if expected.shape == x.shape:
            dist.all_reduce(grad)  # the same on all ranks, its gradient in parts
        close(grad, expected, rtol=0, atol=1e-11)


def refused(words, kind=ValueError, **changes):
    x = torch.zeros(1, 105, 4, 8)
    options = {"q": x, "k": x, "v": x, "topk": 2, "grid": GRID} | changes
    with pytest.raises(kind, match=re.escape(words)) as caught:
        ulysses_attention(**options)
    assert len(str(caught.value).split()) >= 5


def two(rank):
    for name in PROBLEMS:
        agree(name, None, rank, 2)
    agree("gates", None, rank, 2, batch=1)
    mesh = init_device_mesh("cpu", (2,))
    valid = torch.arange(28).view(2, 14) % 3 > 0
    agree("text", mesh, rank, 2, [3, TEXT.length - 3], text_valid=valid)

    x = torch.randn(1, 105, 4, 8)
    first, chosen = ulysses_attention(x, x, x, 2, grid=GRID, return_selection=True)
    assert chosen.shape == (1, 2, 12, 12)
    again = ulysses_attention(x, x, x, None, grid=GRID, selection=chosen)
    assert torch.equal(first, again)
    attend = torch.compile(
        lambda x: ulysses_attention(x, x, x, 2, grid=GRID), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(attend(x), first)
    mixed_types(rank)
    low_precision(rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ulysses_attention(x, x, x, 2, grid=GRID).dtype == torch.bfloat16

    refused(
        "q has 3 heads, which 2 ranks of group cannot share out evenly: use 1 or 3",
        **dict.fromkeys("qkv", x[:, :, :3]),
    )
    refused(f"q has 104 tokens on rank {rank} of the group", q=x[:, 1:])
    refused("lengths must be 2 token counts", lengths=[105, 100])
    refused("lengths[1] must be at least 1", lengths=[210, 0])
    refused("lengths must be a tuple or list", TypeError, lengths=105)
    refused("q must be (B, S, heads, head_dim)", q=x[:, :, None, None])
    refused("k must share the dtype", TypeError, k=x.double())
    refused("gate_coarse must be broadcastable to q", gate_coarse=x[:, :, :3])
    refused("topk must be at least 1", topk=0)
    refused("group must be a process group", TypeError, group=2)
    refused("selection must be for", selection=vsa.select(x[:, :42], x[:, :42], 1, grid=(1, 6, 7)))
    refused("grid must be three token counts", TypeError, grid=None)

    layer = torch.nn.Linear(8, 24).double()
    sharded_layer(layer, rank)


def mixed_types(rank):
    """Gates and the log-sum-exp in fp32 beside bf16: an all-to-all for each type."""
    torch.manual_seed(3)
    gate = torch.randn(1, GRID.length, 4, 8)
    q = torch.randn(1, GRID.length, 4, 8).bfloat16()
    options = {"grid": GRID, "return_lse": True}
    expected, lse = vsa.attention(q, q, q, 2, gate_coarse=gate, **options)
    q, gate = (x.tensor_split(2, dim=1)[rank] for x in (q, gate))
    out, own_lse = ulysses_attention(q, q, q, 2, gate_coarse=gate, **options)
    assert own_lse.dtype == torch.float32
    torch.testing.assert_close(own_lse, lse.tensor_split(2, dim=2)[rank], rtol=0, atol=1e-5)
    torch.testing.assert_close(out, expected.tensor_split(2, dim=1)[rank], rtol=1e-2, atol=1e-2)


def low_precision(rank):
    """Every head is quantised by itself, so that who computes it changes no bit."""
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, GRID.length, 4, 64).bfloat16()
    options = {"grid": GRID, "precision": "int8"}
    expected = vsa.attention(q, k, v, 2, **options)
    q, k, v = (x.tensor_split(2, dim=1)[rank] for x in (q, k, v))
    assert torch.equal(
        ulysses_attention(q, k, v, 2, **options), expected.tensor_split(2, dim=1)[rank]
    )
    refused("precision must be", precision="int4")
    refused("q must be bf16 or fp16 for precision='fp8'", TypeError, precision="fp8")
    more = {"q": q, "k": k, "v": v, "precision": "fp8"}
    refused("tail must be False for precision='fp8'", tail=True, **more)
    refused("q wants a gradient", **more | {"q": q.clone().requires_grad_()})


def sharded_layer(layer, rank):
    """FSDP2 over the same ranks: the mean over ranks of gradients in parts is half their sum."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(2)
    x = torch.randn(1, GRID.length, 4, 8, dtype=torch.float64)
    for p in layer.parameters():
        dist.broadcast(p.data, 0)
    q, k, v = layer(x).chunk(3, dim=-1)
    vsa.attention(q, k, v, 2, grid=GRID).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    q, k, v = (part.contiguous() for part in layer(x.tensor_split(2, dim=1)[rank]).chunk(3, -1))
    ulysses_attention(q, k, v, 2, grid=GRID).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(2 * p.grad.full_tensor(), expected[name], rtol=0, atol=1e-10)


def four(rank):
    for name in ("text", "gates of other kinds"):
        agree(name, dist.group.WORLD, rank, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("queries", "heads"))
    agree("gates", mesh, rank, 4, [100, 68, 30, 12])
    agree("gates", mesh, rank, 4, default=[84, 84, 21, 21])
    agree("keys", mesh, rank, 4, [42, 42, 60, 66])
    agree("text", mesh, rank, 4, [80, 93, 21, 30])
    more_ranks_than_heads(mesh, rank)
    column = init_device_mesh("cpu", (4, 1))
    refused("group has 4 rows, but grid has only 3 layers", group=column)
    refused("whole layers of tiles", group=mesh, lengths=[50, 50, 50, 60])
    refused(
        "text_valid must be None on a 2-D group",
        group=mesh,
        grid=TEXT,
        lengths=[80, 93, 21, 30],
        text_valid=torch.ones(1, 14).bool(),
        **{n: torch.zeros(1, [80, 93, 21, 30][rank], 4, 8) for n in "qkv"},
    )


def more_ranks_than_heads(mesh, rank):
    lengths = [84, 84, 21, 21]
    shared = torch.randn(3, 1, GRID.length, 2, 8, dtype=torch.float64)
    dist.broadcast(shared, 0)
    q, k, v = (x.split(lengths, dim=1)[rank] for x in shared)
    out = ulysses_attention(q, k, v, 3, grid=GRID, group=mesh)
    alone = vsa.attention(*shared, 3, grid=GRID).split(lengths, dim=1)[rank]
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    refused("2 heads, which 4 ranks of group cannot", q=q, k=k, v=v, lengths=lengths)


def start(rank, job, ranks, path, backend="gloo"):
    torch.set_num_threads(1)
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        device_id=device,
        init_method=f"file://{path}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=30),  # a busy machine is slow
    )
    job(rank)
    dist.destroy_process_group()
