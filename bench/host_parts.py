# SPDX-License-Identifier: Apache-2.0
"""Where the time of a call goes: on the host what each part takes, on a GPU each kernel.

usage: python bench/host_parts.py [--out parts.json] [--compiled] [--layers WORD]
       python bench/host_parts.py --tiny

``key`` is what a call depends on, worked out anew each time; ``launches`` is the one crossing into
C++; ``node`` is a node of autograd with as many tensors that computes nothing, both directions.
On a GPU a backward runs in a thread of autograd's own, which the caller waits for; ``one thread``
is without it, and ``dense`` is PyTorch's attention of the same size. ``--compiled`` adds calls that
follow each other in one compiled region, per call: as they are, and with an operator that allocates
its results and computes nothing, which leaves the compiler's and the dispatcher's part.
``--tiny`` runs small cases on a CPU, to see that the script works; their times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vsa
from host import (
    LAYERS,
    QUEUED,
    SHARE,
    STACKED,
    TEXT_LAYERS,
    TINY_LAYERS,
    TINY_TEXT_LAYERS,
    Timer,
    dense,
    layer_of,
)
from vsa.backends import BACKENDS
from vsa.measure.provenance import provenance, write
from vsa.stages import eager
from vsa.stages.inputs import DEFAULT_TILE
from vsa.values.problem import Upstream
from vsa.values.task import NO_PADDING

PROFILED = 10
"""Calls that a kernel's time is the mean of."""


class Nothing(torch.autograd.Function):
    """A node of autograd that computes nothing."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class Launches:
    """A machine that notes how long each crossing into C++ takes.

    Attributes:
        seconds: of each; a forward and a backward are one crossing each.
    """

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.seconds: list[float] = []

    def run_program(self, *arguments: Any) -> None:
        begin = time.perf_counter()
        self.machine.run_program(*arguments)
        self.seconds.append(time.perf_counter() - begin)


def parts(
    timer: Timer, leaves: list[Tensor], layer: dict[str, Any], gated: bool, backend: str
) -> dict[str, Any]:
    """Microseconds of the host by part, and of the GPU by kernel."""
    q, k, v = leaves[:3]
    gates = {"gate_fine": leaves[3], "gate_coarse": leaves[4]} if gated else {}
    valid = None
    if layer:
        valid = torch.rand(1, layer["grid"].text, device=q.device) < 0.7
    used = leaves if gated else leaves[:3]
    upstream = torch.randn_like(q)
    given = *gates.values(), *([None, None] if not gated else [])

    def call() -> Tensor:
        return vsa.attention(q, k, v, SHARE, text_valid=valid, backend=backend, **gates, **layer)

    def key() -> Any:
        options = layer.get("grid"), None, DEFAULT_TILE, None, backend, "mean"
        rest = *options, False, False, False, None, "native"  # no log-sum-exp, choice, tail, mask
        return eager.kind_of(q, k, v, *given, valid, None, SHARE, rest)

    def both() -> Any:
        return torch.autograd.grad(call(), used, upstream)

    both()
    plan = eager.plan_of(key())
    assert plan is not None and plan.prepared is not None
    prepared: Any = plan.prepared
    launches = Launches(prepared.machine)
    upstreams = Upstream(upstream, None)
    tensors = q, k, v, *given, valid, None, *NO_PADDING

    def prepared_both() -> None:
        with torch.no_grad():
            found = prepared.forward(*tensors)
            prepared.backward(upstreams, found, tensors)

    before = prepared.machine
    prepared.machine = prepared.gradients.machine = launches
    queued = QUEUED if timer.cuda else 1  # on a CPU the kernels are emulated: each call takes long
    timer.host(prepared_both, queued)
    prepared.machine = prepared.gradients.machine = before

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return call()

    of_dense = torch.randn_like(dense(q, k, v))

    def dense_both() -> Any:
        return torch.autograd.grad(dense(q, k, v), leaves[:3], of_dense)

    host: dict[str, Callable[[], Any]] = {
        "forward": without_gradients,
        "forward for a backward": call,
        "both": both,
        "key": key,
        "node": lambda: torch.autograd.grad(Nothing.apply(*used), used, upstream),
        "dense both": dense_both,
    }
    row: dict[str, Any] = {
        f"{name}, host us": timer.host(each, queued) for name, each in host.items()
    }
    with torch.autograd.set_multithreading_enabled(False):
        for name in ("both", "node", "dense both"):
            row[f"{name}, one thread, host us"] = timer.host(host[name], queued)
    for place, direction in enumerate(("forward", "backward")):
        row[f"launches of the {direction}, host us"] = 1e6 * median(launches.seconds[place::2])
    if timer.cuda:
        row["kernels"] = kernels(both)
    return row


WHOLE = "whole_forward", "whole_inference", "whole_backward"
"""What the operator of a compiled call asks of a backend."""


class Idle:
    """A function that computes, and once it is told to be idle, returns results of that shape.

    All functions of a call compute once before any of them is idle: a backward reads what its
    forward saved.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute, self.idle, self.results = compute, False, None

    def __call__(self, *values: Any) -> Any:
        if not self.idle:
            self.results = self.compute(*values)
            return self.results
        if isinstance(self.results, Tensor):
            return torch.empty_like(self.results)
        return tuple(None if x is None else torch.empty_like(x) for x in self.results)


def compiled_parts(
    timer: Timer, leaves: list[Tensor], layer: dict[str, Any], gated: bool, backend: str
) -> dict[str, float]:
    """Microseconds of the host for a call among others in a compiled region."""
    gates = {"gate_fine": leaves[3], "gate_coarse": leaves[4]} if gated else {}
    used = leaves if gated else leaves[:3]
    upstream = torch.randn_like(leaves[0])

    def stack() -> Tensor:
        x = leaves[0]
        for _ in range(STACKED):
            x = vsa.attention(x, *leaves[1:3], SHARE, backend=backend, **gates, **layer)
        return x

    found: dict[str, float] = {}
    kernels_of = BACKENDS[backend]
    for name in ("", ", computing nothing"):
        idle = {each: Idle(getattr(kernels_of, each)) for each in WHOLE if name}
        for each, function in idle.items():
            setattr(kernels_of, each, function)
        try:
            torch.compiler.reset()
            for way, call in (("eager", stack), ("compiled", torch.compile(stack))):
                if name and way == "eager":  # which has a plan, and no operator
                    continue

                def both(call: Callable[[], Tensor] = call) -> Any:
                    return torch.autograd.grad(call(), used, upstream)

                def forward(call: Callable[[], Tensor] = call) -> Tensor:
                    with torch.no_grad():
                        return call()

                queued = 3 if timer.cuda else 1
                forward(), both()
                for function in idle.values():
                    function.idle = True
                for direction, function in (("forward", forward), ("both", both)):
                    key = f"{direction} stack {way}{name}, host us"
                    found[key] = timer.host(function, queued) / STACKED
                    if timer.cuda:
                        with torch.autograd.set_multithreading_enabled(False):
                            key = f"{direction} stack {way}{name}, one thread, host us"
                            found[key] = timer.host(function, queued) / STACKED
        finally:
            for each in idle:
                delattr(kernels_of, each)
    return found


def kernels(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / PROFILED for event in profile.key_averages()}
    return {name: time for name, time in times.items() if time > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--tiny", action="store_true", help="small cases on a CPU")
    parser.add_argument("--compiled", action="store_true", help="compiled calls too")
    parser.add_argument("--layers", default="", help="only those whose names have this in them")
    options = parser.parse_args()
    device, backend = ("cpu", "emulated") if options.tiny else ("cuda", "hopper")
    timer = Timer(not options.tiny, 0.01 if options.tiny else options.seconds)
    command = ["bench/host_parts.py", *sys.argv[1:]]
    head = provenance(torch.device(device), command=command, commit=options.commit)
    rows: list[dict[str, Any]] = []
    layers = {**TINY_LAYERS, **TINY_TEXT_LAYERS} if options.tiny else {**LAYERS, **TEXT_LAYERS}
    for name, of_layer in layers.items():
        if options.layers not in name:
            continue
        leaves, layer = layer_of(*of_layer, device)
        for what in ("plain", "gates"):
            rows.append({"layer": name, "what": what})
            rows[-1] |= parts(timer, leaves, layer, what == "gates", backend)
            if options.compiled:
                rows[-1] |= compiled_parts(timer, leaves, layer, what == "gates", backend)
            write(options.out, head, rows, complete=False)
            print(rows[-1], flush=True)
    write(options.out, head, rows)


if __name__ == "__main__":
    main()
