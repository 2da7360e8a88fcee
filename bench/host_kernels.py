# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call of a host's launches, how long each takes, and what lies between them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vsa.measure.timing import settled

CALLS = 20
"""Under the profiler."""
AHEAD = 5
"""Calls in a row that the host is timed for: not so many that it has to wait for the GPU."""
NAME = 90
"""Letters of a kernel's name that are kept."""


def kernels_of(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Microseconds and launches of each kernel in a call, at a settled clock.

    Returns:
        "kernels": of each, [microseconds, launches] in a call, the longest first; "busy us", their
        sum; "span us", from the first kernel's start to the last one's end, over the calls: the
        rest are gaps; "host us", until the host has launched it all.
    """
    cuda = device.type == "cuda"
    settled(run, device)
    found, span = kernels_of_calls(run, device, CALLS if cuda else 1)
    return {
        "busy us": sum(time for time, _ in found.values()),
        "span us": span,
        "host us": _host(run, cuda),
        "kernels": dict(sorted(found.items(), key=lambda item: -item[1][0])),
    }


def kernels_of_calls(
    run: Callable[[], object], device: torch.device, calls: int
) -> tuple[dict[str, list[float]], float]:
    """Microseconds and launches of each kernel in a call, and from first to last, over calls."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(calls):
            run()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in recorded.events() if event.device_type == kind]
    for event in events:
        each = found[event.name[:NAME]]
        each[0] += (event.time_range.end - event.time_range.start) / calls
        each[1] += 1 / calls
    first = min(event.time_range.start for event in events)
    last = max(event.time_range.end for event in events)
    return found, (last - first) / calls


def _host(run: Callable[[], object], cuda: bool) -> float:
    """Microseconds until a call has been launched."""
    calls = AHEAD if cuda else 1
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    taken = time.perf_counter() - start
    if cuda:
        torch.cuda.synchronize()
    return taken / calls * 1e6
