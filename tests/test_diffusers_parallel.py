# SPDX-License-Identifier: Apache-2.0
"""enable_parallelism of diffusers with apply_vsa: two gloo processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.multiprocessing import spawn

pytest.importorskip("diffusers")
import distributed_jobs
import parallel_jobs


def test_two_processes_compute_what_one_would(tmp_path: Path) -> None:
    spawn(distributed_jobs.start, (parallel_jobs.two, 2, tmp_path / "store"), nprocs=2)
