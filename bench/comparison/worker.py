# SPDX-License-Identifier: Apache-2.0
"""One kernel on all cases, in a process of its own; every row goes to a file at once."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from comparison.archives import Unavailable
from comparison.cake import Cake, CakeInFp8
from comparison.cute import CudnnBsa, CudnnBsaInFp8, CudnnFlex, FlashAttention4
from comparison.dense import CudnnDense, FlashAttention3
from comparison.flexible import FlexAttention
from comparison.kernel import Kernel
from comparison.problem import Case, Problem
from comparison.serving import (
    OursInFp8InPairs,
    OursInInt8InPairs,
    OursInPairs,
    SglangH3,
    SpargeAttention,
)
from comparison.sparse import Ours, OursInFp8, OursInInt8, ThunderKittensVsa, WholeAttention
from comparison.timing import rested, rotated
from vsa.measure import patterns
from vsa.measure.gpu_monitor import Monitor
from vsa.measure.timing import spread
from vsa.verify.sampled import Sample

Row = dict[str, Any]
KERNELS: dict[str, type[Kernel]] = {
    "vsa": Ours,
    "vsa_int8": OursInInt8,
    "vsa_fp8": OursInFp8,
    "whole": WholeAttention,
    "fa3": FlashAttention3,
    "cudnn": CudnnDense,
    "cudnn_bsa": CudnnBsa,
    "cudnn_bsa_fp8": CudnnBsaInFp8,
    "cudnn_flex": CudnnFlex,
    "fa4": FlashAttention4,
    "cake": Cake,
    "cake_fp8": CakeInFp8,
    "sglang_h3": SglangH3,
    "sparge": SpargeAttention,
    "vsa_pairs": OursInPairs,
    "vsa_int8_pairs": OursInInt8InPairs,
    "vsa_fp8_pairs": OursInFp8InPairs,
    "tk_vsa": ThunderKittensVsa,
    "flex": FlexAttention,
}
"""By the names that options take."""

FORMER_TITLES = {"cake_cute": "FlashInfer, cake_cute", "vsa_4c13ce9": "vsa as of 4c13ce9"}
"""Of kernels in results that are kept, which cannot be asked for any more."""


def title(name: str) -> str:
    """How tables call a kernel."""
    return FORMER_TITLES[name] if name in FORMER_TITLES else KERNELS[name].title


def cases_of(name: str, cases: Sequence[Case]) -> list[Case]:
    """The cases that a kernel runs: one per layer where it does not take a pattern."""
    if not (KERNELS[name].dense or KERNELS[name].own_pattern):
        return list(cases)
    return list({case.layer: case for case in cases}.values())


def one_line(error: BaseException) -> str:
    """What went wrong; the kind of the error only where its author did not mean it to be read."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def run(
    name: str,
    cases: Sequence[Case],
    directions: Sequence[str],
    device: torch.device,
    folders: Sequence[Path],
    captured: Path | None,
    budget: float,
    to: Path,
) -> None:
    """Append a row for each case and direction, or one that says why the kernel cannot run."""

    def write(row: Row) -> None:
        with to.open("a") as file:
            file.write(json.dumps({"kernel": name} | row) + "\n")

    try:
        kernel = KERNELS[name](device, folders)
    except Exception as error:
        write({"skipped": one_line(error)})
        return
    monitor = Monitor(device)

    def run_case(case: Case) -> None:
        try:
            problem = Problem(case, device, captured)
            kernel.plan(problem)
            for row in measure(kernel, problem, directions, budget, monitor):
                write(row)
        except Unavailable as reason:
            write(described(case, kernel) | {"skipped": one_line(reason)})
        except Exception as error:
            write(described(case, kernel) | {"failed": one_line(error)})

    for case in cases_of(name, cases):
        run_case(case)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    monitor.close()


def once(
    name: str, case: Case, device: torch.device, folders: Sequence[Path], captured: Path | None
) -> None:
    """Two forwards, of which a profiler that starts when it is told to sees the second."""
    kernel = KERNELS[name](device, folders)
    problem = Problem(case, device, captured)
    kernel.plan(problem)
    first, second, *_ = problem.arranged(kernel.order)
    with torch.no_grad():
        kernel.forward(first)
        kernel.synchronize()
        with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
            kernel.forward(second)
            kernel.synchronize()


def described(case: Case, kernel: Kernel) -> Row:
    """What a row is about."""
    return {
        "dense": kernel.dense,
        "grid": list(case.grid),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "pattern": kernel.pattern(case.pattern),
    }


def measure(
    kernel: Kernel,
    problem: Problem,
    directions: Sequence[str],
    budget: float,
    monitor: Monitor,
) -> Iterator[Row]:
    """A row for each direction: parity first, and times if it holds."""
    about = described(problem.case, kernel) | {"inputs": problem.fingerprint()}
    if not kernel.dense:
        shared = patterns.shared_along_w(problem.selection)
        about |= {"topk": problem.topk, "tiles": problem.grid.num_tiles, "shared": shared}
        axes = patterns.chosen_axes(problem.selection)
        about["reuse"] = {str(n): patterns.reuse(problem.selection, n, axes) for n in (2, 3, 4)}
    if kernel.plan_seconds is not None:
        about["plan_ms"] = kernel.plan_seconds * 1e3
    chosen = problem.selection.mask()[0]
    sample = Sample(
        problem.grid,
        torch.ones_like(chosen) if kernel.dense else chosen,
        *problem.sets[0],
        precision=kernel.precision,
    )
    items = problem.arranged(kernel.order)
    begin = time.monotonic()
    out, lse, saved = kernel.forward(items[0])
    lse = None if lse is None else problem.restored(lse, kernel.order)
    errors = sample.forward_errors(problem.restored(out, kernel.order), lse)
    for direction in directions:
        row = about | {"direction": direction}
        try:
            if direction == "backward":
                grads = (
                    problem.restored(x, kernel.order) for x in kernel.backward(items[0], saved)
                )
                errors = sample.backward_errors(*grads)
            row["errors"] = errors
            if wrong := sample.verdict(errors):
                yield row | {"failed": wrong}
                continue
            if direction == "forward":
                with torch.no_grad():
                    timed = measured_times(kernel.forward, items, problem, budget, monitor)
            else:
                pairs = [(x, kernel.forward(x)[2]) for x in items]
                timed = measured_times(
                    lambda pair: kernel.backward(*pair), pairs, problem, budget, monitor
                )
            tflops = problem.flops(direction, kernel.dense) / timed["ms"] / 1e9
            yield row | timed | {"tflops": tflops, "wall": time.monotonic() - begin}
        except Unavailable as reason:
            yield row | {"skipped": one_line(reason)}
        except Exception as error:
            yield row | {"failed": one_line(error)}
        begin = time.monotonic()


def measured_times(
    call: Any, items: Sequence[Any], problem: Problem, budget: float, monitor: Monitor
) -> Row:
    """Median in ms, spread, number of repeats, and what nvidia-smi said meanwhile.

    On a GPU also the median in ms of a call after a rest.
    """
    start = time.monotonic()
    times = rotated(call, items, problem.device, budget)
    found = monitor.during(start, time.monotonic())
    ms = statistics.median(times) * 1e3
    row = {"ms": ms, "spread": spread(times), "repeats": len(times), "gpu": found}
    if problem.device.type == "cuda":
        row["rested_ms"] = statistics.median(rested(call, items, problem.device)) * 1e3
    return row
