# SPDX-License-Identifier: Apache-2.0
"""Attention in eight bits beside the native one: time, and error against fp64.

usage: python bench/low_precision.py [--shape wan-1.3b-480p ...] [--lists random correlated own]
       [--out low_precision.json] [--commit HASH] [--smoke]
       ncu --set full -k regex:persistent --launch-skip 4 --launch-count 1
       python bench/low_precision.py --shape wan-14b-720p --once int8

Inputs of N(0,1). Lists that are given, random and correlated, are calls of the fine stage; with
lists of its own ``vsa.attention`` chooses the tiles, and all stages are timed. Of each precision
sampled tiles are held to fp64 first; then calls are timed by turns, so that all meet the same
clock: eager ones, the same in CUDA graphs, and with given lists the pass that makes eight bits of
keys and values by itself. A rate is that of the kept tiles' products, whatever they are computed
in. On a GPU a row also has the microseconds of each kernel of a call, by PyTorch's profiler. --once
calls one precision twice and measures nothing, for ncu. --smoke runs a tiny case on the emulator,
whose times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from host_parts import kernels
from vsa.backends import BACKENDS
from vsa.backends.kernels import KernelBackend, low_precision
from vsa.measure import patterns, shapes
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds, settled
from vsa.measure.ways import in_a_graph
from vsa.verify.sampled import Sample

SHAPES = ("wan-1.3b-480p", "wan-14b-720p", "ltx-video")
TINY = shapes.Shape(vsa.Grid((5, 6, 9)), 2, 64)
SHARE = 0.125
ROUNDS = 9
PRECISIONS = ("native", "int8", "fp8")
OWN = "own"
"""Lists that the call makes itself."""
ALLOWED = {"native": 0.01, "int8": 0.048, "fp8": 0.065}


def prepared(
    shape: shapes.Shape, kind: str, device: torch.device, backend: str
) -> tuple[list[Tensor], vsa.Selection, Callable[[str], Any]]:
    """q, k and v, the lists, and a call by precision."""
    grid, heads, head_dim = shape.grid, shape.heads, shape.head_dim
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, grid.length, heads, head_dim, device=device, generator=generator).bfloat16()
        for _ in "qkv"
    )
    if kind == OWN:

        def whole(precision: str) -> Any:
            return vsa.attention(
                q, k, v, kept_tiles(grid), grid=grid,
                precision=precision, return_lse=True, backend=backend,
            )  # type: ignore[call-overload]  # fmt: skip

        return [q, k, v], vsa.select(q, k, kept_tiles(grid), grid=grid, backend=backend), whole
    selection = patterns.selection(kind, grid, heads, kept_tiles(grid), device)

    def fine_stage(precision: str) -> Any:
        return vsa.block_sparse_attention(
            q, k, v, selection, precision=precision, return_lse=True, backend=backend
        )  # type: ignore[call-overload]

    return [q, k, v], selection, fine_stage


def kept_tiles(grid: vsa.Grid) -> int:
    """Of each query tile."""
    return max(1, round(SHARE * grid.num_tiles))


def measure(
    name: str, shape: shapes.Shape, kind: str, device: torch.device, backend: str
) -> Iterator[dict[str, Any]]:
    """A row for each precision, and one for the pass before it."""
    grid, heads, head_dim = shape.grid, shape.heads, shape.head_dim
    (q, k, v), selection, call = prepared(shape, kind, device, backend)
    sample = Sample(grid, selection.mask()[0], q, k, v, torch.zeros_like(q))
    errors = {each: sample.forward_errors(*call(each)) for each in PRECISIONS}
    for each, found in errors.items():
        if not found["out"] <= ALLOWED[each]:
            sys.exit(f"low_precision.py: error: {name} in {each} is wrong by {found['out']:.3f}")
    who = BACKENDS[backend]
    assert isinstance(who, KernelBackend)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        (each, "eager"): partial(call, each) for each in PRECISIONS
    }
    if device.type == "cuda":
        calls |= {(each, "graph"): in_a_graph(partial(call, each), 1) for each in PRECISIONS}
    if kind != OWN:
        calls |= {
            (f"quantise {each}", "eager"): partial(
                low_precision.quantise, who.machine, k, v, grid, None, each
            )
            for each in PRECISIONS[1:]
        }
    rounds = 1 if device.type == "cpu" else ROUNDS
    in_a_row = {each: settled(function, device) for each, function in calls.items()}
    times: dict[tuple[str, str], list[float]] = {each: [] for each in calls}
    for _ in range(rounds):
        for each, function in calls.items():
            times[each] += seconds(function, device, 1, in_a_row[each])
    median = {each: 1e3 * statistics.median(found) for each, found in times.items()}
    tokens = grid.tokens * kept_tiles(grid) / grid.num_tiles * grid.tokens
    for (what, way), ms in median.items():
        rate = None if what.startswith("quantise") else 4e-9 * heads * head_dim * tokens / ms
        is_profiled = device.type == "cuda" and way == "eager"
        yield {
            "shape": name,
            "head_dim": head_dim,
            "lists": kind,
            "what": what,
            "calls": way,
            "ms": ms,
            "tflops": rate,
            "of_native": median["native", way] / ms,
            "kernels us": kernels(calls[what, way]) if is_profiled else None,
            "error": errors.get(what, {}).get("out"),
            "lse_error": errors.get(what, {}).get("lse"),
        }


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, choices=sorted(shapes.SHAPES))
    lists = (*patterns.DRAWN, OWN)
    parser.add_argument("--lists", nargs="+", default=lists, choices=lists)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--once", choices=PRECISIONS, help="two calls of it alone, for a profiler")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu" if given.smoke else "cuda")
    if not given.smoke and not torch.cuda.is_available():
        parser.error("it needs a Hopper GPU, and PyTorch finds no GPU here; --smoke needs none")
    backend = "emulated" if given.smoke else "hopper"
    cases = [("smoke", TINY)] if given.smoke else [(x, shapes.SHAPES[x]) for x in given.shape]
    command = ("bench/low_precision.py", *sys.argv[1:])
    head = provenance(device, command=command, commit=given.commit)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        if given.once:
            _, _, call = prepared(cases[0][1], "correlated", device, backend)
            for _ in range(2):
                call(given.once)
            return
        for name, shape in cases:
            for kind in given.lists:
                for row in measure(name, shape, kind, device, backend):
                    rows.append(row)
                    rate = "" if row["tflops"] is None else f"{row['tflops']:7.0f} TFLOP/s"
                    error = "" if row["error"] is None else f"  error {row['error']:.4f}"
                    print(
                        f"{name:16} d{row['head_dim']:<4}{kind:11}{row['what']:14}"
                        f"{row['calls']:6}"
                        f"{row['ms']:9.3f} ms  {row['of_native']:5.2f}x {rate}{error}",
                        flush=True,
                    )
                    write(given.out, head, rows, complete=False)
    write(given.out, head, rows)


if __name__ == "__main__":
    main()
