# SPDX-License-Identifier: Apache-2.0
"""What a tail costs, and how right it is: the same calls with it and without.

usage: python bench/tail.py [--shape wan-1.3b-480p ...] [--out tail.json] [--commit HASH]
       python bench/tail.py --errors [--device cuda]

Of each layer, forward alone and with the backward, with a coarse gate and without gates: sampled
tiles are held to fp64 first, then calls with and without a tail are timed by turns, so that both
meet the same clock. The share printed last is what the tail adds. --errors prints instead the
errors on small problems as multiples of PyTorch's, where scores grow; at most 2 passes. --tiny
runs all of it in seconds on a CPU, whose times say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from vsa.measure import shapes
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds, sets_beyond_cache, settled
from vsa.verify import parity
from vsa.verify.parity import Problem
from vsa.verify.sampled import Sample

SHAPES = ("wan-1.3b-480p", "ltx-video")
TINY = shapes.Shape(vsa.Grid((5, 6, 9)), 2, 64)
TOPK = 0.125
ROUNDS = 9
"""Of timings of a pair of calls; medians count."""
FACTORS = (1.0, 10.0, 30.0, 100.0)
"""Of q: scores are about as large."""


def errors(device: torch.device, backend: str) -> bool:
    """Print a table of them; whether all are at most 2."""
    worst = 0.0
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float16), (64, 128)):
        for factor in FACTORS:
            problem = Problem(
                "tail", grid=(2, 6, 7), tile=(1, 2, 3), topk=2, tail=True, magnitude=factor,
                head_dim=head_dim, dtype=dtype,
            )  # fmt: skip
            found = parity.relative_to_sdpa(problem, device, gradients=True, backend=backend)
            said = "  ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
            print(f"{str(dtype).removeprefix('torch.')} d{head_dim} factor {factor:g}: {said}")
            worst = max(worst, *found.values())
    print(f"worst {worst:.2f} of at most 2")
    return worst <= 2


def measured(layer: shapes.Shape, device: torch.device, backend: str) -> Iterator[dict[str, Any]]:
    """A row for each direction and kind of gates."""
    size = 3, 1, layer.grid.length, layer.heads, layer.head_dim
    nbytes = 2 * torch.Size(size).numel()
    sets = [
        torch.randn(size, device=device, dtype=torch.bfloat16).unbind()
        for _ in range(sets_beyond_cache(nbytes, device))
    ]
    upstream = torch.randn(size[1:], device=device, dtype=torch.bfloat16)
    gate = torch.randn(size[1:], device=device, dtype=torch.bfloat16)
    for gated, backward in itertools.product((False, True), (False, True)):
        leaves = [[x.detach().requires_grad_(backward) for x in each] for each in sets]
        coarse = gate.detach().requires_grad_(backward) if gated else None
        row: dict[str, Any] = {
            "gates": "coarse" if gated else "none",
            "direction": "forward+backward" if backward else "forward",
        }
        if not gated:
            row["errors"] = _sampled(layer, leaves[0], upstream, backend, backward)
        runs = [
            _call(layer, leaves, coarse, upstream, backend, backward, tail)
            for tail in (False, True)
        ]
        calls = [settled(run, device) for run in runs]
        times: tuple[list[float], list[float]] = [], []
        for _ in range(ROUNDS if device.type == "cuda" else 1):
            for run, count, found in zip(runs, calls, times, strict=True):
                found += seconds(run, device, 1, count)
        without, with_tail = (statistics.median(x) * 1e3 for x in times)
        yield row | {"without ms": without, "tail ms": with_tail, "ratio": with_tail / without}


def _call(
    layer: shapes.Shape,
    sets: list[list[Tensor]],
    gate: Tensor | None,
    upstream: Tensor,
    backend: str,
    backward: bool,
    tail: bool,
) -> Callable[[], object]:
    around = itertools.cycle(sets)
    options: dict[str, Any] = {"grid": layer.grid, "backend": backend, "tail": tail}

    def run() -> object:
        inputs = next(around)
        out = vsa.attention(*inputs, TOPK, gate_coarse=gate, **options)
        if not backward:
            return out
        wanted = inputs if gate is None else [*inputs, gate]
        return torch.autograd.grad(out, wanted, upstream)

    return run


def _sampled(
    layer: shapes.Shape, inputs: list[Tensor], upstream: Tensor, backend: str, backward: bool
) -> dict[str, float]:
    """Errors on sampled tiles.

    Raises:
        SystemExit: with a sentence, if they are too large for times to mean anything.
    """
    out, chosen, lse = vsa.attention(
        *inputs, TOPK, grid=layer.grid, backend=backend, tail=True, return_selection=True,
        return_lse=True,
    )  # fmt: skip
    fixed = (x.detach() for x in inputs)
    exact = Sample(layer.grid, chosen.mask()[0], *fixed, upstream, tail=True)
    found = exact.forward_errors(out.detach(), lse.detach())
    if backward:
        found |= exact.backward_errors(*torch.autograd.grad(out, inputs, upstream))
    if wrong := exact.verdict(found):
        raise SystemExit(f"tail.py: {wrong}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="tail.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(shapes.SHAPES))
    parser.add_argument("--errors", action="store_true", help="print errors, time nothing")
    parser.add_argument("--tiny", action="store_true", help="a layer of 270 tokens, anywhere")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, help="write rows to this .json file")
    given = parser.parse_args()
    device = torch.device(given.device)
    backend = "hopper" if device.type == "cuda" else "emulated"
    if given.errors:
        sys.exit(0 if errors(device, backend) else 1)
    if device.type != "cuda" and not given.tiny:
        parser.error("the kernels are timed on a Hopper GPU: pass --tiny to see that it runs")
    rows: list[dict[str, Any]] = []
    command = ["bench/tail.py", *sys.argv[1:]]
    about: dict[str, Any] = provenance(device, command=command, commit=given.commit)
    about |= {"backend": backend, "topk": TOPK}
    layers = {"tiny": TINY} if given.tiny else {name: shapes.by_name(name) for name in given.shape}
    for name, layer in layers.items():
        for row in measured(layer, device, backend):
            rows.append({"shape": name} | row)
            print(
                f"{name}, gates {row['gates']}, {row['direction']}: {row['without ms']:.3f} ms "
                f"without, {row['tail ms']:.3f} with a tail, {row['ratio'] - 1:+.1%}"
                + (f", within {max(row['errors'].values()):.1e}" if "errors" in row else "")
            )
            write(given.out, about, rows, complete=False)
    write(given.out, about, rows, complete=True)


if __name__ == "__main__":
    main()
