# SPDX-License-Identifier: Apache-2.0
"""Where figures come from: the machine, the versions and the commit that made them."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vsa
from vsa.cli import options


def provenance(device: torch.device, *packages: str) -> dict[str, str | None]:
    """What to write beside figures.

    Args:
        device: that they were measured on.
        packages: distributions to name with their versions.

    Returns:
        Strings by name; None for what is not installed, or for a commit that nobody knows.
    """
    return {
        "date": str(date.today()),
        "machine": options.machine(device),
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "vsa": vsa.__version__,
        "commit": _commit(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    """Of the checkout that vsa is imported or was built from; a plus if files had changed since."""
    root = Path(vsa.__file__).resolve().parents[1]
    if _line("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root):
        record = root / "vsa" / "_build.json"
        return json.loads(record.read_text()).get("commit") if record.is_file() else None
    commit = _line("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + "+" * bool(changed)


def _line(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
