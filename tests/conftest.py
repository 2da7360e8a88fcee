# SPDX-License-Identifier: Apache-2.0
"""The installed package is the one under test, and every test starts from the same seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the clone itself on the path, where the compiled part is missing.
if not any((ROOT / "vsa").glob("_C.*")):
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]

torch.set_num_threads(1)


def _hopper() -> bool:
    from vsa.backends import BACKENDS, Request

    return torch.cuda.is_available() and BACKENDS["hopper"].why_not(Request("cuda")) is None


@pytest.fixture(params=["emulated", "hopper"])
def machine(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Where the project's own kernels run: backend and device, the emulator and a Hopper GPU."""
    if request.param == "emulated":
        return "emulated", "cpu"
    if not _hopper():
        pytest.skip("needs a Hopper GPU")
    return "hopper", "cuda"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
