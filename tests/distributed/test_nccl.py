# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism on several Hopper GPUs, by NCCL, against one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import nccl_jobs
from distributed import ranks as ranks_of

from vsa.backends import BACKENDS, Request


@pytest.mark.parametrize(("job", "ranks"), [(nccl_jobs.two, 2), (nccl_jobs.four, 4)])
def test_gpus_compute_what_one_would(job: Any, ranks: int, tmp_path: Path) -> None:
    there = torch.cuda.device_count()
    if there < ranks or BACKENDS["hopper"].why_not(Request("cuda")) is not None:
        pytest.skip(f"needs {ranks} Hopper GPUs, and there are {there} GPUs")
    ranks_of.run(job, ranks, tmp_path, "nccl")
