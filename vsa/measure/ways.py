# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host, and what it takes in a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

QUEUED = 20
"""Calls whose launches fit the queue of a stream, so that the host never waits for the GPU."""


def host_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds that the host takes to issue a call on a GPU that has nothing else to do."""
    for _ in range(3):
        function()
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(QUEUED):
            function()
        samples.append((time.perf_counter() - begin) / QUEUED)
    torch.cuda.synchronize()
    return statistics.median(samples)


def in_a_graph(function: Callable[[], object], calls: int) -> Callable[[], None]:
    """So many calls captured in one CUDA graph, to be replayed."""
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
    return graph.replay
