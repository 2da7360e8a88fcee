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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
