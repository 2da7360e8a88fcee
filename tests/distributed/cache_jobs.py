# SPDX-License-Identifier: Apache-2.0
"""What processes of test_distributed.py do with a cache on every rank, against one process."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
from python.streamed import Stream, steps, with_gates
from torch.distributed.device_mesh import init_device_mesh

import vsa
from vsa.distributed import caches as caches_of
from vsa.distributed import shard_sequence, ulysses_attention
from vsa.distributed.text import parted

CLOSE = {"rtol": 0, "atol": 1e-12}
COARSE, BOTH = {"gate_coarse": True}, {"gate_coarse": True, "gate_fine": True}
CHUNKS = 5
"""More than a cache holds."""


def streamed(rank):
    ranks = dist.get_world_size()
    torch.manual_seed(6)
    of_heads = (1, 3, 0.5, 1.0)
    agree(rank, ranks, kv_heads=4, topk=0.4, head_groups=2, **BOTH)
    agree(rank, ranks, kv_heads=1, batch=1, topk=of_heads, sinks=0, tail=True, **COARSE)
    lengths = [8] * (ranks - 1) + [30 - 8 * (ranks - 1)]
    agree(rank, ranks, topk=3, score=vsa.SubBlocks(2), lengths=lengths)
    agree(rank, ranks, topk=3, prefix=5, text="written", **COARSE)
    agree(rank, ranks, topk=3, prefix=5, text="sharded", kv_heads=1, **COARSE)
    agree(rank, ranks, topk=vsa.TopP(0.6), prefix=5, text="replicated", **BOTH)
    if ranks == 2:
        emulated = {"dtype": torch.bfloat16, "head_dim": 64, "batch": 1, "capacity": 2, "chunks": 3}
        agree(rank, ranks, topk=0.4, backend="emulated", **emulated, **COARSE)
        compiled(rank, ranks)
        layers(rank, ranks)
    refusals(rank, ranks)
    differences(rank)


def caches(stream, ranks):
    """Of one process, and of one rank."""
    whole = stream.cache()
    stream.kv_heads, kv_heads = (
        stream.kv_heads // math.gcd(stream.kv_heads, ranks),
        stream.kv_heads,
    )
    own = stream.cache()
    stream.kv_heads = kv_heads
    return whole, own


def own_heads(x, rank, ranks):
    """(B, S, heads, ...) -> those of a rank, repeated where there are fewer than ranks."""
    x = x.repeat_interleave(ranks // math.gcd(ranks, x.shape[2]), dim=2)
    return x.unflatten(2, (ranks, -1))[:, :, rank]


def agree(rank, ranks, topk, text=None, chunks=CHUNKS, lengths=None, head_groups=None, **more):
    """Every step of a video on one process and on all: out, choice, log-sum-exp, and caches."""
    fields = {name: more.pop(name) for name in [*more] if name in Stream.__dataclass_fields__}
    stream = Stream(heads=4, **{"kv_heads": 2} | fields)
    whole, own = caches(stream, ranks)
    comes = text in ("sharded", "replicated")
    grid = vsa.Grid(stream.chunk, stream.tile, stream.prefix if comes else 0)
    if text == "written":
        pair = stream.keys_of_text()
        whole.write_text(*pair)
        own.write_text(*(own_heads(x, rank, ranks) for x in pair))
    if comes:
        more["text_valid"] = torch.arange(stream.prefix).expand(stream.batch, -1) % 3 > 0
    counts = lengths
    if counts is None:
        tokens = grid.tokens if text == "replicated" else grid.length
        counts = [len(part) for part in torch.arange(tokens).tensor_split(ranks)]

    def mine(x):
        if text != "replicated":
            return x.split(counts, dim=1)[rank]
        prefix, video, _ = parted(x, grid)
        return torch.cat([prefix, video.split(counts, dim=1)[rank]], dim=1)

    close = torch.testing.assert_close
    sharded = {"lengths": lengths, "head_groups": head_groups, "cache": own}
    sharded |= {"grid": grid if comes else None, "text": text if comes else "sharded"}
    asked = {"return_selection": True, "return_lse": True}
    for is_last, q, (k, v) in steps(stream, chunks):
        q, k, v = (x.flatten(1, 3) for x in (q, k, v))
        if comes:
            q, k, v = (torch.cat([x[:, : stream.prefix].flip(1), x], 1) for x in (q, k, v))
        options = with_gates(more, q) | asked
        wanted = vsa.attention(q, k, v, topk, cache=whole, **options)
        gates = {n: mine(x) for n, x in options.items() if n.startswith("gate")}
        parts = [mine(x) for x in (q, k, v)]
        found = ulysses_attention(*parts, topk, **options | gates | sharded)
        close(found[0], mine(wanted[0]), **CLOSE)
        close(found[2], mine(wanted[2].mT).mT, **CLOSE)
        bits = wanted[1].bitmap.unflatten(1, (ranks, -1))[:, rank]
        assert torch.equal(found[1].bitmap, bits), "the choice"
        assert own.chunks == whole.chunks
        for held, of_all in zip(own.keys_and_values(), whole.keys_and_values(), strict=True):
            assert torch.equal(held, own_heads(of_all, rank, ranks))
        again = ulysses_attention(
            *parts, None, selection=found[1], **options | gates | sharded | asked
        )
        assert torch.equal(again[0], found[0])
        if is_last:
            whole.advance()
            own.advance()
    assert own.chunks == whole.chunks == stream.capacity - 1 < chunks, "some were evicted"


def compiled(rank, ranks):
    stream = Stream(heads=4, kv_heads=2, capacity=2, dtype=torch.float32)
    cache, eager = (caches(stream, ranks)[1] for _ in range(2))
    attend = torch.compile(
        lambda q, k, v: ulysses_attention(q, k, v, 3, cache=cache),
        backend="aot_eager",
        fullgraph=True,
    )
    for _, q, (k, v) in steps(stream, 4, of_each=1):
        parts = [x.flatten(1, 3).tensor_split(ranks, dim=1)[rank] for x in (q, k, v)]
        assert torch.equal(attend(*parts), ulysses_attention(*parts, 3, cache=eager))
        cache.advance()
        eager.advance()


def layers(rank, ranks):
    """A layer takes its cache where its sequence is sharded, too."""
    stream = Stream(heads=4, kv_heads=4, batch=1, head_dim=8)
    whole, own = caches(stream, ranks)
    layer = vsa.nn.VideoSparseAttention(32, 4, topk=3, tile="auto").double()
    for weight in layer.parameters():
        dist.broadcast(weight.data, 0)
    with torch.no_grad():
        xs = torch.randn(CHUNKS, 1, 30, 32, dtype=torch.float64)
        wanted = []
        for x in xs:
            wanted.append(layer(x, cache=whole))
            whole.advance()
        shard_sequence(layer, dist.group.WORLD)
        for x, truth in zip(xs, wanted, strict=True):
            out = layer(x.tensor_split(ranks, dim=1)[rank], cache=own)
            torch.testing.assert_close(out, truth.tensor_split(ranks, dim=1)[rank], **CLOSE)
            own.advance()


def one(rank, ranks, **changes):
    """A call whose shapes fit, and a cache for it."""
    length = len(torch.arange(30).tensor_split(ranks)[rank])
    x = torch.ones(1, length, 4, 8)
    settings = {"capacity": 2, "tile": (2, 2, 3), "dtype": torch.float32}
    cache = vsa.KVCache(1, 4 // ranks, 8, (2, 3, 5), **settings | changes)
    return {"q": x, "k": x, "v": x, "topk": 2, "cache": cache}


def refused(words, call, kind=ValueError):
    """In a sentence, and the cache is as it was."""
    cache = call["cache"]
    is_cache = isinstance(cache, vsa.KVCache)
    if is_cache:
        before = cache.chunks, cache.position, cache._tokens.clone(), cache._means.clone()
    with pytest.raises(kind, match=words if ".*" in words else re.escape(words)):
        ulysses_attention(**call)
    if is_cache:
        assert (cache.chunks, cache.position) == before[:2]
        assert torch.equal(cache._tokens, before[2]) and torch.equal(cache._means, before[3])


def refusals(rank, ranks):
    call = one(rank, ranks)
    q, text = call["q"], vsa.Grid((2, 3, 5), (2, 2, 3), prefix=5)
    refused("cache must be a vsa.KVCache", call | {"cache": [1]}, TypeError)
    mask = vsa.masks.ChunkCausal(2)
    refused("mask cannot stand beside cache", call | {"mask": mask})
    refused("kv_grid follows from cache", call | {"kv_grid": (2, 3, 5)})
    refused("grid must be the chunk of the cache, (2, 3, 5)", call | {"grid": (2, 3, 4)})
    refused("grid must be", call | {"grid": text})
    refused("tile must be that of the cache", call | {"tile": (1, 2, 3)})
    refused("topk must be at least 1", call | {"topk": 0})
    refused("k requires a gradient", call | {"k": q.clone().requires_grad_()})
    refused("gate_fine requires a gradient", call | {"gate_fine": q.clone().requires_grad_()})
    halves = {name: q.bfloat16() for name in "qkv"}
    refused("q must have the dtype of the cache", call | halves, TypeError)
    refused(f"q has {q.shape[1] - 1} tokens on rank", call | {"q": q[:, 1:]})
    fewer = vsa.KVCache(1, 4, 8, (2, 3, 5), 2, tile=(2, 2, 3), dtype=torch.float32)
    words = f"cache must have kv_heads={4 // ranks}, what each of the {ranks} ranks of group"
    refused(words, call | {"cache": fewer})
    refused("head_groups must be at least 1", call | {"head_groups": 0})
    bitmap = vsa.select(*[torch.ones(1, 60, 4 // ranks, 8)] * 2, 1, grid=(4, 3, 5))
    refused("selection must be for", call | {"selection": bitmap, "topk": None})
    refused("prefix of 5 text tokens that nobody has written", one(rank, ranks, prefix=5))
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        refused("cache must be None on a 2-D group", call | {"group": mesh})
    call["cache"].reset()
    full = one(rank, ranks, sinks=2)
    for _ in range(2):
        ulysses_attention(**full)
        full["cache"].advance()
    refused("cache has no place for another chunk", full)
    ulysses_attention(**call)  # and all go on
    assert call["cache"].chunks == 1


def differences(rank):
    """Ranks whose caches differ, or whose cache refuses; the exchange would not notice."""
    ranks, last = dist.get_world_size(), rank == dist.get_world_size() - 1
    same = "cache must be the same on all ranks of the group, but it is "
    other = one(rank, ranks, capacity=2 + last)
    refused(same + f"at chunk 0 with chunk=(2, 3, 5), capacity={2 + last}", other)
    call = one(rank, ranks)
    layers_of_a_model = [call, one(rank, ranks)]
    for _ in range(4):  # every position is one that some cache was agreed on at
        for each in layers_of_a_model:
            ulysses_attention(**each)
            each["cache"].advance()
    call["cache"].reset()
    for _ in range(2):
        ulysses_attention(**call)
        call["cache"].advance()
    if last:  # one chunk ahead, of those that all have been at
        vsa.attention(*[torch.ones(1, 30, 4 // ranks, 8)] * 3, 2, cache=call["cache"])
        call["cache"].advance()
    refused(same + f"at chunk {2 + last} with", call)
    group, call = dist.group.WORLD, one(rank, ranks)
    before = caches_of._calls[group]
    caches_of._calls[group] += last  # what a rank has on the way that has not advanced
    refused(re.escape(same) + f"at chunk 0 with .* after {before + last} calls", call)
    caches_of._calls[group] = before
    own = ValueError if last else RuntimeError
    call = one(rank, ranks, prefix=5)
    pair = torch.ones(1, 5, 4 // ranks, 8)
    call["cache"].write_text(pair, pair)
    ulysses_attention(**call)
    call["cache"].reset()
    if not last:
        call["cache"].write_text(pair, pair)
    refused("text tokens that nobody has written", call, own)
    call = one(rank, ranks)
    more = {"cache": None, "grid": vsa.Grid((2, 3, 5), (2, 2, 3))} if last else {}
    refused(same + str(not last), call | {"scale": 0.25} | more)
    ulysses_attention(**call)
