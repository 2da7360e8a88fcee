# SPDX-License-Identifier: Apache-2.0
# ruff: noqa
"""usage: builds2.py NAME OUT"""
import json, sys
import torch, vsa
from vsa.measure import patterns
from vsa.verify.sampled import Sample
name, out = sys.argv[1:3]
device = torch.device("cuda")
CASES = [((32, 32, 32), 12, (64, 256)), ((20, 48, 80), 8, (150,)), ((7, 22, 40), 32, (15,))]
for shape, heads, topks in CASES:
    for d in (64, 128):
        grid = vsa.Grid(shape)
        g = torch.Generator(device).manual_seed(0)
        q, k, v, go = (torch.randn(1, grid.length, heads, d, device=device, generator=g).bfloat16() for _ in "qkvg")
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        for kind in ("random", "correlated"):
            for topk in topks:
                chosen = patterns.selection(kind, grid, heads, topk, device)
                def fwd():
                    with torch.no_grad(): return vsa.block_sparse_attention(q, k, v, chosen, backend="hopper")
                o = vsa.block_sparse_attention(q, k, v, chosen, backend="hopper")
                def bwd(): return torch.autograd.grad(o, (q, k, v), go, retain_graph=True)
                err = None
                if topk == topks[0]:
                    sample = Sample(grid, chosen.mask()[0], q.detach(), k.detach(), v.detach(), go)
                    err = sample.forward_errors(o.detach(), None) | sample.backward_errors(*bwd())
                    assert max(err.values()) < 0.01, err
                for what, call in (("forward", fwd), ("backward", bwd)):
                    b, e = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    def many(n):
                        b.record(); [call() for _ in range(n)]; e.record(); e.synchronize(); return b.elapsed_time(e)
                    many(3); once = many(4) / 4
                    many(int(20 / once) + 1); n = int(180 / once) + 2
                    row = {"build": name, "grid": shape, "d": d, "kind": kind, "topk": topk, "precision": what, "error": err and {"out": max(err.values())}, "ms": many(n) / n}
                    print(json.dumps(row), flush=True); open(out, "a").write(json.dumps(row) + "\n")
