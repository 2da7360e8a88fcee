# SPDX-License-Identifier: Apache-2.0
"""Clock, power and temperature of a GPU while something runs, as nvidia-smi tells them."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from types import TracebackType
from typing import NamedTuple

import torch

SAMPLE_MS = 50
POWER_CAP = 0x4
"""In NVML's reasons for a clock: the software keeps the power limit."""


def gpu_identity(device: torch.device) -> str:
    """The GPU as nvidia-smi knows it, whichever GPUs this process sees."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


class Reading(NamedTuple):
    """What nvidia-smi says at one time: MHz, W, degrees Celsius, and reasons for the clock."""

    clock: float
    power: float
    celsius: float
    reasons: int


class Monitor:
    """What nvidia-smi says about a GPU, twenty times a second until it is closed.

    On a CPU, or where there is no nvidia-smi, it knows nothing.
    """

    QUERY = "clocks.sm,power.draw.instant,temperature.gpu,clocks_event_reasons.active"

    def __init__(self, device: torch.device):
        self.readings: list[tuple[float, Reading]] = []
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

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if reading := reading_of(line):
                self.readings.append((time.monotonic(), reading))

    def during(self, start: float, end: float) -> dict[str, float]:
        """Medians between two times of ``time.monotonic``, and the lowest clock; empty if unknown.

        MHz, W and degrees Celsius; for which share of the samples power alone held the clock down.
        """
        found = [reading for when, reading in self.readings if start <= when <= end]
        if not found:
            return {}
        return {
            "clock": statistics.median(reading.clock for reading in found),
            "lowest_clock": min(reading.clock for reading in found),
            "power": statistics.median(reading.power for reading in found),
            "celsius": statistics.median(reading.celsius for reading in found),
            "power_capped": statistics.mean(reading.reasons == POWER_CAP for reading in found),
            "samples": len(found),
        }

    def close(self) -> None:
        """Stop nvidia-smi."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def reading_of(line: str) -> Reading | None:
    """A line of nvidia-smi; None for a message, or where this GPU does not tell all of it."""
    *numbers, reasons = line.split(",")
    try:
        clock, power, celsius = map(float, numbers)
        return Reading(clock, power, celsius, int(reasons, base=16))
    except ValueError:
        return None
