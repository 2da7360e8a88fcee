# SPDX-License-Identifier: Apache-2.0
"""The backward of the fine stage in one pass beside that in two, on the same lists, in turns.

usage: python bench/one_pass.py [--captured captured.pt] [--out results.json] [--commit HASH]
                                [--layers 32x32x32:12 20x48x80:8] [--topk 0.125] [--balanced]
                                [--smoke]

head_dim 64, bf16. For each pattern and layer: what neighbouring key tiles share, the differences of
dq, dk and dv from those of two passes, the milliseconds of either way, and those of each kernel.
``--balanced`` takes lists of equal length instead, which neighbouring key tiles share wholly or not
at all: what a pair of either kind costs. ``--smoke`` runs a tiny case on the emulator; its times
mean nothing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vsa
from vsa.backends import BACKENDS
from vsa.backends.kernels.backward import transpose
from vsa.backends.kernels.forward import neighbour_axes
from vsa.measure import patterns
from vsa.measure.layers import LAYERS, parse_layer
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds
from vsa.values import checks
from vsa.values.bitmap import count
from vsa.values.problem import Problem, Saved, Upstream

HEAD_DIM = 64
WAYS = {"two passes": True, "one pass": False}
"""Whether gradients have to be the same bits every time."""
TURNS = 9
KERNEL = re.compile(r"(FineBackwardKeys|FineBackwardQueries|backward_rows|round_sums)")


def balanced(shared: bool, grid: vsa.Grid, heads: int, topk: int) -> vsa.Selection:
    """Lists drawn from pairs of key tiles that are neighbours along w: both of a pair, or one."""
    n, generator = grid.num_tiles, torch.Generator().manual_seed(0)
    pairs = torch.rand(1, heads, n, n // 2, generator=generator)
    drawn = pairs.topk(max(1, topk // 2) if shared else topk).indices * 2
    if shared:
        drawn = torch.cat([drawn, drawn + 1], -1)
    else:
        drawn += torch.randint(2, drawn.shape, generator=generator)
    mask = torch.zeros(1, heads, n, n, dtype=torch.bool).scatter_(-1, drawn, True)
    return vsa.Selection.from_mask(mask, grid)


class Layer:
    """One layer's inputs, lists and forward."""

    def __init__(self, grid: vsa.Grid, selection: vsa.Selection, device: torch.device) -> None:
        heads = selection.bitmap.shape[1]
        torch.manual_seed(0)
        q, k, v, self.grad_out = torch.randn(
            4, 1, grid.length, heads, HEAD_DIM, device=device, dtype=torch.bfloat16
        ).unbind()
        self.device = device
        self.backend = BACKENDS["hopper" if device.type == "cuda" else "emulated"]
        ints = grid.as_ints()
        self.problem = Problem(
            q, k, v, selection.bitmap, None, ints, ints, HEAD_DIM**-0.5, self.backend.name
        )
        self.saved = Saved(*self.backend.forward(self.problem, grid.num_tiles))
        self.grid, self.heads = grid, heads

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        upstream = Upstream(self.grad_out, None)
        return self.backend.backward(upstream, self.saved, self.problem, self.grid.num_tiles)

    def shared(self) -> list[float]:
        """Of each head: what neighbouring key tiles share of the queries that selected either."""
        machine = self.backend.machine  # type: ignore[attr-defined]
        bits, _ = transpose(machine, self.problem.bitmap.contiguous(), self.grid.num_tiles)
        axes = neighbour_axes(machine, bits, self.grid.tiles, self.heads)
        layers, n = self.grid.tiles[0], self.grid.num_tiles
        found = []
        for head in range(self.heads):
            axis = int(axes[0, head])
            order = [_serpentine(place, axis, layers, n // layers) for place in range(n)]
            rows = bits[0, head][order]
            a, b = rows[0 : n - 1 : 2], rows[1::2]
            found.append(int(count(a & b).sum()) / max(1, int(count(a | b).sum())))
        return found


def _serpentine(place: int, axis: int, layers: int, layer: int) -> int:
    """``serpentine_tile`` of csrc/prim/facts.h."""
    from vsa import _C

    if axis & _C.BACKWARDS:
        place = layers * layer - 1 - place
    if not axis & _C.ALONG_T:
        return place
    column, step = divmod(place, layers)
    return (step if column % 2 == 0 else layers - 1 - step) * layer + column


def in_way(way: str, call: Callable[[], object]) -> Any:
    """What a call returns in a way of the backward."""
    torch.use_deterministic_algorithms(WAYS[way])
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def errors(layer: Layer) -> dict[str, float]:
    """Largest differences of one pass from two, as shares of the root mean square."""
    one, two = (in_way(way, layer.backward) for way in ("one pass", "two passes"))
    found = {}
    for name, a, b in zip(("dq", "dk", "dv"), one, two, strict=True):
        size = b.double().pow(2).mean().sqrt()
        found[name] = ((a.double() - b.double()).abs().max() / size).item()
    return found


def kernel_times(layer: Layer, way: str) -> dict[str, float]:
    """Milliseconds of each kernel of a backward."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            in_way(way, layer.backward)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        if name := KERNEL.search(event.key):
            label = name[1] + (" one pass" if "OnePass" in event.key else "")
            times[label] = times.get(label, 0) + event.device_time_total / 5e3
    return {name: round(ms, 5) for name, ms in times.items()}


def measure(name: str, layer: Layer) -> dict[str, Any]:
    """A row."""
    shares = layer.shared()
    row: dict[str, Any] = {"pattern": name, "layer": patterns.layer_name(layer.grid)}
    row |= {"grid": list(layer.grid.shape), "heads": layer.heads, "head_dim": HEAD_DIM}
    row |= {"shared": statistics.mean(shares), "shared of heads": [round(x, 3) for x in shares]}
    row |= {f"{grad} from two passes": error for grad, error in errors(layer).items()}
    calls = 10 if layer.device.type == "cuda" else 1
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        in_way(way, lambda: seconds(layer.backward, layer.device, 2, calls))
    for _ in range(TURNS if calls > 1 else 1):
        for way in WAYS:
            each = in_way(way, lambda: seconds(layer.backward, layer.device, 1, calls))
            times[way] += each
    row |= {f"{way}, ms": statistics.median(each) * 1e3 for way, each in times.items()}
    if calls > 1:
        try:
            row["kernels"] = {way: kernel_times(layer, way) for way in WAYS}
        except RuntimeError as reason:  # no profiler on this machine
            print(f"times of kernels: {reason}", flush=True)
    row["times as fast"] = row["two passes, ms"] / row["one pass, ms"]
    print(
        f"{name}, {patterns.layer_name(layer.grid)}, {layer.heads} heads: shared "
        f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f}); two passes "
        f"{row['two passes, ms']:.3f} ms, one {row['one pass, ms']:.3f}, "
        f"{row['times as fast']:.3f} times as fast; differences "
        + ", ".join(f"{x} {row[f'{x} from two passes']:.4f}" for x in ("dq", "dk", "dv")),
        flush=True,
    )
    for way, each in row.get("kernels", {}).items():
        print(f"    {way}: " + ", ".join(f"{k} {v:.3f}" for k, v in each.items()), flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every pattern and layer, print a line each, write JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captured", type=Path, metavar="FILE", help="made by bench/captured.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--topk", type=float, default=0.125, help="share of the key tiles kept")
    parser.add_argument("--layers", nargs="+", type=parse_layer, metavar="TxHxW:HEADS")
    parser.add_argument("--balanced", action="store_true", help="lists that share all, and nothing")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("this needs a Hopper GPU; --smoke runs a tiny case on the emulator, untimed")
    device = torch.device("cpu" if options.smoke else "cuda")
    tiny = ["8x12x12:2"]
    layers = options.layers or [parse_layer(x) for x in (tiny if options.smoke else LAYERS)]
    torch.utils.deterministic.fill_uninitialized_memory = False  # no part of what is measured
    head = provenance(device, command=["bench/one_pass.py", *arguments], commit=options.commit)
    rows = []
    for kind in ("all shared", "none shared") if options.balanced else patterns.KINDS:
        if kind == "captured" and options.captured is None:
            continue
        for extent, heads in layers:
            grid = vsa.Grid(extent)
            topk = checks.top_k(options.topk, grid.num_tiles)
            if options.balanced:
                lists = balanced(kind == "all shared", grid, heads, topk).to(device)
            else:
                lists = patterns.selection(kind, grid, heads, topk, device, options.captured)
            rows.append(measure(kind, Layer(grid, lists, device)))
            if options.out:
                write(options.out, head, rows, False)
    if options.out:
        write(options.out, head, rows, True)


if __name__ == "__main__":
    main()
