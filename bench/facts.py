# SPDX-License-Identifier: Apache-2.0
"""Where and with what a measurement was made, for the head of every JSON file."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import vsa
from vsa.cli.options import processor
from vsa.measure.gpu_monitor import gpu_identity

ROOT = Path(__file__).resolve().parent.parent


def facts(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Machine, driver, versions, commit and date.

    Args:
        device: what is measured on.
        commit: where the sources are no clone, what they were made of.
    """
    found = {"device": processor(), "driver": "none", "limits": "none"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = asked_of_nvidia_smi("driver_version", device)
        found["limits"] = asked_of_nvidia_smi("clocks.max.sm,power.limit", device)
    return found | {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        "python": platform.python_version(),
        "vsa": vsa.__version__,
        "commit": commit or head_commit(),
        "date": str(date.today()),
    }


def asked_of_nvidia_smi(query: str, device: torch.device) -> str:
    """What nvidia-smi answers, or why it does not."""
    command = ["nvidia-smi", f"--id={gpu_identity(device)}", f"--query-gpu={query}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
    except FileNotFoundError:
        return "no nvidia-smi"
    return done.stdout.strip() or "nvidia-smi did not say"


def head_commit() -> str:
    """The commit that is checked out, with a note where files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:
        return "not known"
    if head.returncode:
        return "not known"
    return head.stdout.decode().strip() + (" and changes" if changed.stdout.strip() else "")
