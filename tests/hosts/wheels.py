# SPDX-License-Identifier: Apache-2.0
"""The hosts' wheels, unpacked: downloaded once into a folder, never installed, never committed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.json")


def facts() -> list[dict[str, Any]]:
    """What we rely on in each host."""
    return json.loads(FACTS.read_text())


def fetch(distribution: str, version: str, folder: Path) -> Path:
    """The folder of an unpacked wheel; pip downloads it if it is not there.

    Raises:
        SystemExit: pip has no such wheel.
    """
    target = folder / f"{distribution.replace('-', '_')}-{version}"
    if not target.is_dir():
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12"]
        command = [sys.executable, "-m", "pip", "download", *options]
        subprocess.run([*command, f"{distribution}=={version}", "-d", str(folder)], check=True)
        (wheel,) = folder.glob(f"{distribution.replace('-', '_')}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(target)
        wheel.unlink()
    return target


def source(root: Path, module: str) -> str | None:
    """The text of a module in an unpacked wheel."""
    base = root.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text()
    return None
