# SPDX-License-Identifier: Apache-2.0
"""Times of a call that goes round several inputs, and the GPU's clock and power meanwhile."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from facts import gpu_identity
from vsa.measure import CALLS_IN_A_ROW, seconds

Item = TypeVar("Item")
FEWEST, MOST = 7, 60
"""Timed repeats, each the mean of up to ten calls in a row."""
SAMPLE_MS = 50
RESTS, REST = 7, 0.05
"""Calls after a rest, and how long it is, seconds."""
POWER_CAP = 0x4
"""In NVML's reasons for a clock: the software keeps the power limit."""


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


def rested(
    call: Callable[[Item], object], items: Sequence[Item], device: torch.device
) -> list[float]:
    """Seconds of a call on a GPU that has rested.

    A short call ends before the power limit holds the clock down; one of tens of milliseconds does
    not. It is the second of two calls after a pause: what Python does before it runs beside the
    first.
    """
    around = itertools.cycle(items)

    def after_a_rest() -> float:
        time.sleep(REST)
        return seconds(lambda: call(next(around)), device, 1, calls=1)[0]

    return [after_a_rest() for _ in range(RESTS)]


class Sample(NamedTuple):
    """What nvidia-smi says at one time: MHz, W, degrees Celsius, and reasons for the clock."""

    clock: float
    power: float
    celsius: float
    reasons: int


class Monitor:
    """What nvidia-smi says about a GPU, twenty times a second until it is closed."""

    QUERY = "clocks.sm,power.draw.instant,temperature.gpu,clocks_event_reasons.active"

    def __init__(self, device: torch.device):
        self.samples: list[tuple[float, Sample]] = []
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
            if sample := sample_of(line):
                self.samples.append((time.monotonic(), sample))

    def during(self, start: float, end: float) -> dict[str, float]:
        """Medians between two times of ``time.monotonic``, and the lowest clock; empty if unknown.

        MHz, W and degrees Celsius; for which share of the samples power alone held the clock down.
        """
        found = [sample for when, sample in self.samples if start <= when <= end]
        if not found:
            return {}
        return {
            "clock": statistics.median(sample.clock for sample in found),
            "lowest_clock": min(sample.clock for sample in found),
            "power": statistics.median(sample.power for sample in found),
            "celsius": statistics.median(sample.celsius for sample in found),
            "power_capped": statistics.mean(sample.reasons == POWER_CAP for sample in found),
            "samples": len(found),
        }

    def close(self) -> None:
        """Stop nvidia-smi."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def sample_of(line: str) -> Sample | None:
    """A line of nvidia-smi; None for a message, or where this GPU does not tell all of it."""
    *numbers, reasons = line.split(",")
    try:
        return Sample(*map(float, numbers), int(reasons, base=16))
    except (TypeError, ValueError):
        return None
