# SPDX-License-Identifier: Apache-2.0
# ruff: noqa
"""usage: builds.py NAME OUT [--quick] [--smoke]"""
import json, sys, time, statistics
import torch, vsa
from vsa.measure import patterns
from vsa.verify.sampled import Sample
name, out = sys.argv[1:3]
smoke = "--smoke" in sys.argv
device = torch.device("cpu" if smoke else "cuda")
backend = "emulated" if smoke else "hopper"
CASES = [  # grid, heads, d, kinds, topk, precisions
    ((32, 32, 32), 12, 128, ("random", "correlated"), (64, 16, 256), ("native",)),
    ((32, 32, 32), 12, 64, ("random", "correlated"), (64,), ("native",)),
    ((20, 48, 80), 8, 128, ("random", "correlated"), (150,), ("native",)),
    ((20, 48, 80), 8, 64, ("correlated",), (150,), ("native",)),
    ((21, 30, 52), 12, 128, ("random", "correlated"), (78,), ("native",)),
    ((7, 22, 40), 32, 64, ("random",), (14,), ("native",)),
]
if smoke: CASES = [((5, 6, 9), 2, 64, ("random",), (3,), ("native",))]
LIMIT = {"native": 0.01, "int8": 0.05, "fp8": 0.065}
for shape, heads, d, kinds, topks, precisions in CASES:
    grid = vsa.Grid(shape)
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, grid.length, heads, d, device=device, generator=g).bfloat16() for _ in "qkv")
    for kind in kinds:
        for topk in topks:
            chosen = patterns.selection(kind, grid, heads, topk, device)
            for precision in precisions:
                call = lambda: vsa.block_sparse_attention(q, k, v, chosen, precision=precision, return_lse=True, backend=backend)
                err = None
                with torch.no_grad():
                    if topk == topks[0]:
                        found = Sample(grid, chosen.mask()[0], q, k, v, torch.zeros_like(q)).forward_errors(*call())
                        err = found
                        assert found["out"] < LIMIT[precision], (shape, d, kind, precision, found)
                    row = {"build": name, "grid": shape, "d": d, "kind": kind, "topk": topk, "precision": precision, "error": err}
                    if not smoke:
                        b, e = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        def many(n):
                            b.record(); [call() for _ in range(n)]; e.record(); e.synchronize(); return b.elapsed_time(e)
                        many(3); once = many(5) / 5
                        many(int(30 / once) + 1)
                        graph = torch.cuda.CUDAGraph()
                        s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
                        with torch.cuda.stream(s): call()
                        torch.cuda.current_stream().wait_stream(s)
                        inner = max(1, int(5 / once))
                        with torch.cuda.graph(graph):
                            for _ in range(inner): call()
                        def replays(n):
                            b.record(); [graph.replay() for _ in range(n)]; e.record(); e.synchronize(); return b.elapsed_time(e)
                        replays(2); n = int(250 / (once * inner)) + 1
                        row["ms"] = replays(n) / n / inner
                        row["tflops"] = 4 * d * heads * (grid.tokens * topk / grid.num_tiles) * grid.tokens / row["ms"] / 1e9
                        del graph
                    print(json.dumps(row), flush=True)
                    open(out, "a").write(json.dumps(row) + "\n")
