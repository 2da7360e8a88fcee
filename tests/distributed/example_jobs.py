# SPDX-License-Identifier: Apache-2.0
"""What a process of test_distributed.py does that runs examples/ulysses.py."""

from __future__ import annotations

import contextlib
import os
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ulysses.py"


def start(rank: int, ranks: int, port: int, folder: Path) -> None:
    """The example as torchrun starts it; what it prints is in a file of the folder."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with (folder / str(rank)).open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
