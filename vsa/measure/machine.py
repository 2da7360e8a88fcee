# SPDX-License-Identifier: Apache-2.0
"""The machine by name: its processor or GPU, and what nvidia-smi says of the GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from vsa.measure.gpu_monitor import gpu_identity

BUSY_LOAD = 0.35
"""Processes per core that others may run before times are doubted."""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def input_dtype(device: torch.device) -> torch.dtype:
    """What models run in there: the GPU kernels take bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def machine(device: torch.device) -> str:
    """The device by name, and the PyTorch that runs on it, for a line of text."""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}, PyTorch {torch.__version__}"


def processor() -> str:
    """The CPU by the name that the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or f"CPU with {os.cpu_count()} cores"


def other_load() -> float:
    """The share of this machine's cores that was busy within the last minute; 0 where not known.

    More processes may wait than there are cores; no more than all cores are busy with them.
    """
    try:
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    except OSError:
        return 0.0


def ask_nvidia_smi(query: str, device: torch.device) -> str | None:
    """What nvidia-smi answers about a GPU; None on a CPU, or where it does not answer.

    Args:
        query: fields of ``nvidia-smi --query-gpu``, separated by commas.
        device: a CPU or a GPU.
    """
    if device.type != "cuda":
        return None
    name = f"--id={gpu_identity(device)}"
    return first_line("nvidia-smi", name, f"--query-gpu={query}", "--format=csv,noheader")


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
