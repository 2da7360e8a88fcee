# SPDX-License-Identifier: Apache-2.0
"""Where the GPU's time of a training step goes, kernel by kernel, sparse beside dense.

usage: python bench/training_parts.py [--models WORD] [--out parts.json] [--commit HASH]
       python bench/training_parts.py --tiny

The steps are those of ``bench/host.py``. Times are of kernels alone, from PyTorch's profiler, so
that gaps in which a GPU waits for the host do not count; their sum is what a CUDA graph of the step
takes, if nothing overlaps. ``--tiny`` counts PyTorch's own operators on a CPU, to see that the
script works.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from training_steps import MODELS, TINY_MODELS, Kind, Training
from vsa.measure.provenance import provenance, write

STEPS = 5
"""That a kernel's time is the mean of."""
GROUPS = {
    "attention": r"vsa::|flash|fmha|sdpa|cudnn_generated|scaled_dot_product",
    "products": r"gemm|cutlass|cublas|nvjet|splitK|addmm|::mm",
    "optimizer": r"multi_tensor|adam",
    "norms": r"layer_norm|LayerNorm|GammaBeta",
    "copies and casts": r"copy|Copy|CatArray|aten::cat|Memcpy",
    "reductions": r"reduce|sum",
}
"""The first that a kernel's name fits; all else is element by element."""


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, kernel))
    return next(found, "element-wise")


def kernels(step: Any, cuda: bool) -> dict[str, tuple[float, float]]:
    """Microseconds and launches of each kernel in a step."""
    for _ in range(3):
        step()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    times = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event)
        for event in recorded.key_averages()
    }
    return {
        name: (time / STEPS, event.count / STEPS) for name, (time, event) in times.items() if time
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="only those whose names have this in them")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    options = parser.parse_args()
    device, backend = ("cpu", "torch") if options.tiny else ("cuda", "hopper")
    command = ["bench/training_parts.py", *sys.argv[1:]]
    head = provenance(torch.device(device), command=command, commit=options.commit)
    rows: list[dict[str, Any]] = []
    for name, model in (TINY_MODELS if options.tiny else MODELS).items():
        if options.models not in name:
            continue
        for kind in (Kind(sparse=True), Kind(sparse=False)):
            found = kernels(Training(model, kind, device, backend).step(), not options.tiny)
            groups: dict[str, float] = defaultdict(float)
            for kernel, (time, _) in found.items():
                groups[group_of(kernel)] += time
            row: dict[str, Any] = {"model": name, "what": str(kind)}
            row["kernels ms"] = sum(groups.values()) / 1e3
            row["launches"] = sum(count for _, count in found.values())
            row |= {f"{group} ms": time / 1e3 for group, time in groups.items()}
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()})
            longest = sorted(found.items(), key=lambda item: -item[1][0])
            for kernel, (time, count) in longest[:20]:
                print(f"{time:10.1f} us {count:6.1f} x  {kernel[:110]}")
            row["kernels"] = {kernel: {"us": t, "launches": n} for kernel, (t, n) in found.items()}
            rows.append(row)
            write(options.out, head, rows, complete=False)
    write(options.out, head, rows)


if __name__ == "__main__":
    main()
