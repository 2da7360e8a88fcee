# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from vsa.measure.cpu_profiler import cpu_profile

Result = TypeVar("Result")
CALLS_IN_A_ROW = 10
SETTLING, TIMED = 0.3, 0.15
"""Seconds of calls before any is timed, and seconds of calls in a row that are."""
L2_CACHES = 3
"""How many times the L2 cache all inputs that calls go round fill at least."""


def seconds(
    function: Callable[[], object],
    device: torch.device,
    repeats: int,
    calls: int = CALLS_IN_A_ROW,
) -> list[float]:
    """Duration of a call in seconds, ``repeats`` times, after one to warm up.

    On a GPU each is the mean of ``calls`` in a row: what Python does before a launch then runs
    beside the kernel before it, as it does in a model.
    """
    function()
    return [_timed(function, device, calls) for _ in range(repeats)]


def settled(function: Callable[[], object], device: torch.device) -> int:
    """Call until a GPU's clock has settled, and say how many calls in a row to time.

    They fill ``TIMED`` seconds, so that neither the first launch of them nor the clock of a GPU
    that has rested counts for much; on a CPU it is one.
    """
    if device.type != "cuda":
        return 1
    function()
    once = total = _timed(function, device, 1)
    while total < SETTLING:
        calls = max(1, int(TIMED / once))
        once = _timed(function, device, calls)
        total += once * calls
    return max(1, int(TIMED / once))


def _timed(function: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def sets_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes calls go round, so that none is in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-L2_CACHES * cache // nbytes))


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def peak_memory(function: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result of a call, and the most bytes that its tensors held at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with cpu_profile(profile_memory=True) as profile:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak
