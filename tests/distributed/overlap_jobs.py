# SPDX-License-Identifier: Apache-2.0
"""What processes of test_distributed.py do with heads that travel in groups."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed.distributed_jobs import GRID, PROBLEMS, agree, refused
from integrations import text_jobs

import vsa
from vsa.distributed import exchange, ulysses, ulysses_attention
from vsa.stages import eager


def grouped(rank):
    for name in PROBLEMS:
        agree(name, None, rank, 2, head_groups=2, batch=1)
    agree("gates", None, rank, 2, [100, 110], head_groups=9)
    agree("text", None, rank, 2, head_groups=2)
    text_jobs.agree(text_jobs.TEXT, rank, 2, head_groups=2)
    with pytest.MonkeyPatch.context() as patch:
        functional = partial(ulysses.attend_shards, transport="functional")
        patch.setattr(ulysses, "attend_shards", functional)
        agree("gates", None, rank, 2, head_groups=2, batch=1)
        agree("gates of other kinds", None, rank, 2, [100, 110])
    selections_and_graphs(rank)
    kernels(rank)
    refused("head_groups must be at least 1", head_groups=0)
    refused("head_groups must be a whole number", TypeError, head_groups=1.5)


def selections_and_graphs(rank):
    x = torch.randn(1, 105, 4, 8)
    plain = {"grid": GRID, "head_groups": 2}
    out, chosen = ulysses_attention(x, x, x, (1, 2, 3, 4), return_selection=True, **plain)
    assert chosen.shape == (1, 2, 12, 12) and chosen.most == 2 * rank + 2
    again, same = ulysses_attention(x, x, x, None, selection=chosen, return_selection=True, **plain)
    assert torch.equal(out, again) and torch.equal(same.bitmap, chosen.bitmap)
    attend = torch.compile(
        lambda x: ulysses_attention(x, x, x, (1, 2, 3, 4), **plain),
        backend="aot_eager",
        fullgraph=True,
    )
    y = x.clone().requires_grad_()
    assert torch.equal(attend(y), out)
    grads = [
        torch.autograd.grad(function(y).square().sum(), y)[0]
        for function in (attend, lambda x: ulysses_attention(x, x, x, (1, 2, 3, 4), **plain))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)
    twice = ulysses_attention(y, y, y, 2, **plain).square().sum()
    with pytest.raises(RuntimeError, match="create_graph must be False where the sequence"):
        torch.autograd.grad(twice, y, create_graph=True)
    dist.barrier()


def kernels(rank):
    """Prepared calls of the project's own kernels: the choice of the first group precedes v."""
    torch.manual_seed(5)
    grid = vsa.Grid((2, 6, 7), tile=(2, 3, 4))
    whole = torch.randn(4, 1, grid.length, 4, 64).bfloat16()
    q, k, v, gate = whole
    expected = vsa.attention(q, k, v, 2, grid=grid, backend="emulated")
    mine = [x.tensor_split(2, dim=1)[rank].clone().requires_grad_() for x in whole]
    called = []
    waits, attends = exchange.Exchange.wait, eager.attend

    def wait(self, number, buffer):
        called.append(f"wait {number}")
        return waits(self, number, buffer)

    def attend(plan, tokens, text_valid, selection, ready=None):
        called.append("prepared")
        return attends(plan, tokens, text_valid, selection, ready)

    options = {"grid": grid, "backend": "emulated", "head_groups": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.Exchange, "wait", wait)
        patch.setattr(eager, "attend", attend)
        for _ in range(2):
            called.clear()
            out = ulysses_attention(*mine[:3], 2, **options)
            torch.testing.assert_close(
                out, expected.tensor_split(2, dim=1)[rank], rtol=1e-2, atol=1e-2
            )
    # q and k, then the choice, then v, all of the second group; and the output of both.
    assert called == ["wait 0", "prepared", "wait 1", "wait 2", "prepared", "wait 0", "wait 1"]
    grads = torch.autograd.grad(out, mine[:3], torch.ones_like(out))
    q, k, v = (x.clone().requires_grad_() for x in whole[:3])
    alone = vsa.attention(q, k, v, 2, grid=grid, backend="emulated")
    wanted = torch.autograd.grad(alone, (q, k, v), torch.ones_like(alone))
    for found, whole_grad in zip(grads, wanted, strict=True):
        part = whole_grad.tensor_split(2, dim=1)[rank]
        torch.testing.assert_close(found, part, rtol=2e-2, atol=2e-2)
    q, k, v, gate = whole
    expected = vsa.attention(q, k, v, 2, grid=grid, gate_coarse=gate, backend="emulated")
    for _ in range(2):
        gated = ulysses_attention(*mine[:3], 2, gate_coarse=mine[3], **options)
        part = expected.tensor_split(2, dim=1)[rank]
        torch.testing.assert_close(gated, part, rtol=1e-2, atol=1e-2)
