# SPDX-License-Identifier: Apache-2.0
"""Where figures come from, and the JSON files that hold them.

Every file has the same head (``HEAD``), then the settings of its benchmark, then its rows. In all
of them times are milliseconds and their names end in ``ms``; memory is bytes; a grid is the list
[T, H, W]; a share is a number from 0 to 1; a type is named as PyTorch does without ``torch.``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vsa
from vsa.measure.machine import ask_nvidia_smi, device_name, first_line

HEAD = (
    *("command", "date", "commit", "device", "driver", "limits"),
    *("python", "torch", "cuda", "cudnn", "vsa"),
)
"""What every file says of its origin; each is a string, or null where nobody knows it."""


def provenance(
    device: torch.device,
    *packages: str,
    command: Sequence[str] | None = None,
    commit: str | None = None,
) -> dict[str, str | None]:
    """The head of a file: when, of what, on what and by which command figures were made.

    Args:
        device: that they were measured on.
        packages: distributions to name with their versions, besides PyTorch and this one.
        command: the words of the command line; by default those of ``vsa``.
        commit: of the sources, where they are no clone and the build does not know it.

    Returns:
        ``HEAD`` and the packages; None for what is not installed or not known.
    """
    cudnn = torch.backends.cudnn.version()
    return {
        "command": shlex.join(("vsa", *sys.argv[1:]) if command is None else command),
        "date": str(date.today()),
        "commit": commit or _commit(),
        "device": device_name(device),
        "driver": ask_nvidia_smi("driver_version", device),
        "limits": ask_nvidia_smi("clocks.max.sm,power.limit", device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "vsa": vsa.__version__,
        **{package: _version(package) for package in packages},
    }


def write(
    path: Path | None,
    head: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    complete: bool = True,
) -> None:
    """Put a new file in the place of the old one, so that whoever reads finds one of the two.

    Args:
        path: None for nowhere.
        head: from ``provenance``, with the settings of the benchmark.
        rows: what was measured so far.
        complete: whether these are all.
    """
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        content = {**head, "complete": complete, "rows": list(rows)}
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A file that ``write`` wrote.

    Raises:
        ValueError: a file that is no JSON, or whose head or rows are missing.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, but it cannot be read: {error}") from None
    missing = [name for name in (*HEAD, "rows") if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{path} must be a file of this project, but lacks {', '.join(missing)}")
    return dict(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that vsa is imported or was built from; a plus if files had changed since."""
    root = Path(vsa.__file__).resolve().parents[1]
    if first_line("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root):
        record = root / "vsa" / "_build.json"
        return json.loads(record.read_text()).get("commit") if record.is_file() else None
    commit = first_line("git", "-C", str(root), "rev-parse", "HEAD")
    changed = first_line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + "+" * bool(changed)
