# SPDX-License-Identifier: Apache-2.0
"""What a call of attention costs the host, and what that leaves of the kernels' speed-up.

usage: python bench/host.py [--baseline FOLDER] [--out results.json] [--parts LIST] [--compiled]
                            [--layers WORD]
       python bench/host.py --tiny
       python bench/host.py --no-kernels --parts layers [--baseline FOLDER]

For each layer it times the forward, and the forward with the backward: as eager calls, as a CUDA
graph of the same calls, and dense (``scaled_dot_product_attention``), also with text, masked and
not, and one layer with a given selection, with strides that are copied, and checkpointed; beside
them the microseconds that the host is busy with one call while the GPU has nothing to do, for both
directions with the backward in autograd's thread and in the caller's. ``training`` times steps of
a small transformer with sparse and with dense attention, eager and as one CUDA graph.
``--compiled`` times calls that follow each other as layers do, eager and in one compiled region,
and training steps whose blocks are compiled; ``--apart`` training steps of layers whose projections
are not computed as one product. ``--baseline`` is a folder with another installed build of vsa,
which runs the same cases in a process of its own, so that one run compares both. ``--tiny`` runs
small cases on a CPU, to see that the script works; their times mean nothing. ``--no-kernels`` runs
the small cases on a CPU and leaves out the kernels: what is left is the host's own part, without
allocations and launches of a GPU; results are whatever lies in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import vsa
from training_steps import MODELS, TINY_MODELS, Kind, Training, projections

SHARE = 0.125
LAYERS = {
    "LTX, 6,144 tokens": ((8, 24, 32), 32, 64),
    "4,096 tokens": ((4, 32, 32), 12, 128),
    "8,192 tokens, d 64": ((8, 32, 32), 12, 64),
    "8,192 tokens, d 128": ((8, 32, 32), 12, 128),
    "16,384 tokens (the paper)": ((16, 32, 32), 16, 64),
    "23,296 tokens (FastVideo)": ((16, 28, 52), 12, 128),
}
TEXT_LAYERS = {
    "CogVideoX-2B, 226 of text": (vsa.Grid((13, 30, 45), prefix=226), 30, 64),
    "9x34x60, 256 of text": (vsa.Grid((9, 34, 60), suffix=256), 24, 128),
}
WAYS_LAYER = "8,192 tokens, d 64"
"""That is also called with a given selection, with strides that are copied, and checkpointed."""
TINY_LAYERS = {"tiny": ((4, 8, 8), 2, 64)}
TINY_TEXT_LAYERS = {"tiny, text": (vsa.Grid((4, 4, 8), prefix=3, suffix=70), 2, 64)}
QUEUED = 20
"""Calls whose launches fit the queue of a stream, so that the host never waits for the GPU."""
STACKED = 8
"""Calls in one compiled region, as the layers of a model are."""
LONG = 0.04
"""Seconds that calls go on before the device is waited for."""


def median(samples: list[float]) -> float:
    return statistics.median(samples)


class Timer:
    """Times calls on a device, by means of its own: other builds have no ``vsa.measure.ways``.

    Attributes:
        cuda: whether there is a GPU; on a CPU every time is that of the clock.
        seconds: how long each figure is measured.
    """

    def __init__(self, cuda: bool, seconds: float) -> None:
        self.cuda, self.seconds = cuda, seconds

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def call(self, function: Callable[[], Any]) -> float:
        """Milliseconds of a call among others, GPU and host overlapping as they do in a model."""
        for _ in range(3):
            function()
        self.wait()
        begin = time.perf_counter()
        function()
        self.wait()
        calls = max(1, min(QUEUED, int(LONG / (time.perf_counter() - begin))))
        samples, end = [], time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(samples) < 5:
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            self.wait()
            samples.append((time.perf_counter() - begin) / calls * 1e3)
        return median(samples)

    def host(self, function: Callable[[], Any], queued: int = QUEUED) -> float:
        """Microseconds that the host takes to issue a call, of so many in a row."""
        for _ in range(3):
            function()
        samples, end = [], time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(samples) < 5:
            self.wait()
            begin = time.perf_counter()
            for _ in range(queued):
                function()
            samples.append((time.perf_counter() - begin) / queued * 1e6)
        self.wait()
        return median(samples)

    def graph(self, function: Callable[[], Any], calls: int = QUEUED) -> float | None:
        """Milliseconds of a call in a CUDA graph of so many; None on a CPU."""
        if not self.cuda:
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return self.call(graph.replay) / calls


def leave_out_kernels() -> None:
    """Let the emulator do nothing: then a call takes what it costs outside of C++."""
    from vsa.backends import BACKENDS

    machine = type(BACKENDS["emulated"].machine)  # type: ignore[attr-defined]
    for name in ("run", "run_rows", "run_program"):
        setattr(machine, name, lambda *_: None)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v)


class Case(NamedTuple):
    """A call of a layer, and the tensors whose gradients it has."""

    what: str
    call: Callable[[], Tensor]
    used: list[Tensor]


def layer_of(
    extent: Any, heads: int, head_dim: int, device: str
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves q, k, v, gate_coarse and gate_fine, flat where there is text, and options."""
    has_text = isinstance(extent, vsa.Grid)
    tokens = (extent.length,) if has_text else extent
    shape = 1, *tokens, heads, head_dim
    leaves = [torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(5)]
    return leaves, {"grid": extent} if has_text else {}


def cases(name: str, leaves: list[Tensor], layer: dict[str, Any], backend: str) -> Iterator[Case]:
    """All calls of a layer."""
    q, k, _, gate_coarse, gate_fine = leaves
    of_q = leaves[:3]
    gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
    attend = partial(vsa.attention, backend=backend, **layer)
    yield Case("plain", lambda: attend(*of_q, SHARE), of_q)
    yield Case("gates", lambda: attend(*of_q, SHARE, **gates), leaves)
    if layer:
        valid = torch.rand(1, layer["grid"].text, device=q.device) < 0.7
        yield Case("masked text", lambda: attend(*of_q, SHARE, text_valid=valid), of_q)
    if name in (WAYS_LAYER, *TINY_LAYERS):
        with torch.no_grad():
            chosen = vsa.select(q, k, SHARE)
        wide = [torch.cat((x.detach(), x.detach()[..., :4]), -1) for x in of_q]
        copied = [x[..., : q.shape[-1]].requires_grad_() for x in wide]
        yield Case("selection", lambda: attend(*of_q, None, selection=chosen), of_q)
        yield Case("copied strides", lambda: attend(*copied, SHARE), copied)
        again = partial(checkpoint, lambda *x: attend(*x, SHARE), use_reentrant=False)
        yield Case("checkpointed", lambda: again(*of_q), of_q)
    yield Case("dense", lambda: dense(*of_q), of_q)


def layer_rows(options: argparse.Namespace, timer: Timer) -> Iterator[dict[str, Any]]:
    """Times of single layers."""
    layers = {**TINY_LAYERS, **TINY_TEXT_LAYERS} if options.tiny else {**LAYERS, **TEXT_LAYERS}
    for name, layer in layers.items():
        if options.layers not in name:
            continue
        leaves, more = layer_of(*layer, options.device)
        upstream = torch.randn_like(leaves[0])
        for kind, call, used in cases(name, leaves, more, options.backend):
            given = dense(*leaves[:3]).detach().clone() if kind == "dense" else upstream

            def forward(call=call) -> Tensor:
                with torch.no_grad():
                    return call()

            def both(call=call, used=used, given=given) -> Any:
                return torch.autograd.grad(call(), used, given)

            row: dict[str, Any] = {"layer": name, "what": kind}
            for direction, function in (("forward", forward), ("both", both)):
                row[f"{direction} ms"] = timer.call(function)
                row[f"{direction} host us"] = timer.host(function)
                if kind != "checkpointed":  # which keeps the state of random numbers
                    row[f"{direction} graph ms"] = timer.graph(function)
            # Autograd runs a backward in a thread of its own, which a short one waits for.
            with torch.autograd.set_multithreading_enabled(False):
                row["both one thread host us"] = timer.host(both)
            if options.compiled and kind in ("plain", "gates") and not more:
                row |= compiled_row(timer, leaves, used, upstream, options.backend)
            yield row


def compiled_row(
    timer: Timer, leaves: list[Tensor], used: list[Tensor], upstream: Tensor, backend: str
) -> dict[str, float | None]:
    """Calls that follow each other, as layers do, eager and in one compiled region; per call."""
    gates = {"gate_coarse": leaves[3], "gate_fine": leaves[4]} if len(used) == 5 else {}

    def stack() -> Tensor:
        x = leaves[0]
        for _ in range(STACKED):
            x = vsa.attention(x, *leaves[1:3], SHARE, backend=backend, **gates)
        return x

    torch.compiler.reset()
    row: dict[str, float | None] = {}
    for way, call in (("eager", stack), ("compiled", torch.compile(stack, fullgraph=True))):

        def forward(call=call) -> Tensor:
            with torch.no_grad():
                return call()

        def both(call=call) -> Any:
            return torch.autograd.grad(call(), used, upstream)

        for direction, function in (("forward", forward), ("both", both)):
            row[f"{direction} stack {way} host us"] = timer.host(function, 3) / STACKED
            row[f"{direction} stack {way} ms"] = timer.call(function) / STACKED
    return row


def training_rows(options: argparse.Namespace, timer: Timer) -> Iterator[dict[str, Any]]:
    """Times of training steps: bf16 autocast, AdamW, mean square error."""
    for name, model in (TINY_MODELS if options.tiny else MODELS).items():
        kinds = product((True, False), (False, True)[: 1 + options.compiled])
        for kind in [*starmap(Kind, kinds), *[Kind(True, apart=True)] * options.apart]:
            with projections(kind.apart):
                training = Training(model, kind, options.device, options.backend)
                row: dict[str, Any] = {"model": name, "what": str(kind)}
                row["step ms"] = timer.call(training.step())
                row["step graph ms"] = timer.graph(training.step(capturable=timer.cuda), 1)
            yield row


def measured(
    options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All rows of this build; what there is goes to ``keep`` after each."""
    timer = Timer(options.device == "cuda", 0.01 if options.tiny else options.seconds)
    rows: list[dict[str, Any]] = []
    parts = {"layers": layer_rows, "training": training_rows}
    for part in options.parts.split(","):
        for row in parts[part](options, timer):
            rows.append({"build": options.build, **row})
            keep(rows)
            numbers = {
                key: round(value, 3) for key, value in row.items() if isinstance(value, float)
            }
            names = " ".join(str(row[key]) for key in ("layer", "model", "what") if key in row)
            print(options.build, "|", names, "|", numbers, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, help="folder with another build of vsa")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--parts", default="layers,training", help="what to time")
    parser.add_argument("--layers", default="", help="only those whose names have this in them")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--compiled", action="store_true", help="time compiled calls too")
    parser.add_argument("--apart", action="store_true", help="train with projections apart too")
    parser.add_argument("--tiny", action="store_true", help="small cases on a CPU")
    parser.add_argument("--no-kernels", action="store_true", help="what Python costs, on a CPU")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--build", default="this", help="name of the rows")
    options = parser.parse_args()
    options.tiny |= options.no_kernels
    known = [*(TINY_LAYERS | TINY_TEXT_LAYERS if options.tiny else LAYERS | TEXT_LAYERS)]
    if not any(options.layers in name for name in known):
        parser.error(f"--layers must be in the name of one of {known}, but it is {options.layers}")
    options.device = "cpu" if options.tiny else "cuda"
    options.backend = "auto"
    if options.no_kernels:
        options.backend = "emulated"
        leave_out_kernels()
    rows: list[dict[str, Any]] = []
    if options.baseline is not None:
        passed = [argument for argument in sys.argv[1:] if argument not in ("--tiny", "--apart")]
        for name in ("--baseline", "--out"):
            if name in passed:
                del passed[passed.index(name) : passed.index(name) + 2]
        file = Path(str(options.out or "host.json") + ".baseline")
        command = [sys.executable, __file__, *passed, "--build", "baseline", "--out", str(file)]
        command += ["--tiny"] * options.tiny
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(options.baseline)}, check=True)
        rows += json.loads(file.read_text())["rows"]
        file.unlink()
    if options.build != "this":
        measured(options, lambda new: options.out.write_text(json.dumps({"rows": new})))
        return
    from vsa.measure.provenance import provenance, write  # another build may not have it

    command = ["bench/host.py", *sys.argv[1:]]
    head = provenance(torch.device(options.device), command=command, commit=options.commit)
    new = measured(options, lambda new: write(options.out, head, [*rows, *new], complete=False))
    write(options.out, head, [*rows, *new])


if __name__ == "__main__":
    main()
