# ruff: noqa
import torch

import vsa
from vsa.measure import patterns

for kind, shape, heads, topk in (
    [(k, (32, 32, 32), 12, t) for k in ("random", "correlated") for t in (64, 256)]
    + [(k, (20, 48, 80), 8, 150) for k in ("random", "correlated")]
    + [("random", (7, 22, 40), 32, 14)]
):
    s = patterns.selection(kind, vsa.Grid(shape), heads, topk, torch.device("cpu"))
    open(f"lists/{kind}-{'x'.join(map(str, shape))}-{heads}-{topk}", "wb").write(
        s.bitmap.contiguous().numpy().tobytes()
    )
