# SPDX-License-Identifier: Apache-2.0
"""Times of a call that goes round several inputs, and the GPU's clock and power meanwhile."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from facts import gpu_identity
from vsa.measure import CALLS_IN_A_ROW, seconds

Item = TypeVar("Item")
FEWEST, MOST = 7, 60
"""Timed repeats, each the mean of up to ten calls in a row."""
SAMPLE_MS = 50


def rotated(
    call: Callable[[Item], object], items: Sequence[Item], device: torch.device, budget: float
) -> list[float]:
    """Seconds of a call, many times, in about ``budget`` seconds, after warming up on every item.

    Each call gets the next item, so that none finds its inputs in the L2 cache.
    """
    around = itertools.cycle(items)

    def go() -> None:
        call(next(around))

    for _ in items:
        go()
    once = statistics.median(seconds(go, device, 3, calls=1))
    calls = max(1, min(CALLS_IN_A_ROW, int(budget / FEWEST / once)))
    repeats = max(FEWEST, min(MOST, int(budget / calls / once)))
    return seconds(go, device, repeats, calls=calls)


class Monitor:
    """What nvidia-smi says about a GPU, twenty times a second until it is closed."""

    QUERY = "clocks.sm,power.draw.instant,temperature.gpu"

    def __init__(self, device: torch.device):
        self.samples: list[tuple[float, list[float]]] = []
        self.process: subprocess.Popen[str] | None = None
        if device.type != "cuda":
            return
        query = [f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits"]
        command = ["nvidia-smi", f"--id={gpu_identity(device)}", f"--loop-ms={SAMPLE_MS}", *query]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            try:
                values = [float(value) for value in line.split(",")]
            except ValueError:  # a value that this GPU does not tell, or a message
                continue
            self.samples.append((time.monotonic(), values))

    def during(self, start: float, end: float) -> dict[str, float]:
        """Medians between two times of ``time.monotonic``, and the lowest clock; empty if unknown.

        MHz, W and degrees Celsius.
        """
        found = [values for when, values in self.samples if start <= when <= end]
        if not found:
            return {}
        clock, power, celsius = (list(column) for column in zip(*found, strict=True))
        return {
            "clock": statistics.median(clock),
            "lowest_clock": min(clock),
            "power": statistics.median(power),
            "celsius": statistics.median(celsius),
            "samples": len(found),
        }

    def close(self) -> None:
        """Stop nvidia-smi."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
