# SPDX-License-Identifier: Apache-2.0
"""Time of the stages of ``vsa.attention``, in ranges that profilers can see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd.profiler import record_function
from torch.cuda import nvtx

from vsa.measure import stage_hooks
from vsa.measure.cpu_profiler import cpu_profile

PREFIX = "vsa "
WARM_UP = 2


def record(
    call: Callable[[stage_hooks.Range], None], device: torch.device, repeats: int
) -> dict[str, float]:
    """Seconds per call in each range: those that ``call`` opens, and those of the stages.

    On a GPU the ranges are NVTX's, timed by events, and profilers that wait for
    ``cudaProfilerStart`` see the repeats without the calls that warm up; on a CPU they are those of
    PyTorch's profiler.

    Args:
        call: is given what opens a range by name.
        device: where it runs.
        repeats: how many times.
    """
    for _ in range(WARM_UP):
        call(lambda _: nullcontext())
    times = (_on_gpu if device.type == "cuda" else _on_cpu)(call, repeats)
    return {name: seconds / repeats for name, seconds in times.items()}


def _on_gpu(call: Callable[[stage_hooks.Range], None], repeats: int) -> dict[str, float]:
    spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def open_range(name: str) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with nvtx.range(PREFIX + name):
            begin.record()
            yield
            end.record()
        spans.append((name, begin, end))

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    with stage_hooks.named(open_range):
        for _ in range(repeats):
            call(open_range)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    times: defaultdict[str, float] = defaultdict(float)
    for name, begin, end in spans:
        times[name] += begin.elapsed_time(end) / 1e3
    return times


def _on_cpu(call: Callable[[stage_hooks.Range], None], repeats: int) -> dict[str, float]:
    def open_range(name: str) -> record_function:
        return record_function(PREFIX + name)

    with cpu_profile() as profiler, stage_hooks.named(open_range):
        for _ in range(repeats):
            call(open_range)
    return {
        event.key.removeprefix(PREFIX): event.cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.key.startswith(PREFIX)
    }
