# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with 2 and 4 gloo processes against one process, in fp64."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from child_process import run
from distributed import cache_jobs, distributed_jobs, fault_jobs, overlap_jobs
from distributed import ranks as ranks_of
from integrations import text_jobs

from vsa.distributed import ring_attention, ulysses_attention

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("job", "ranks"),
    [
        (distributed_jobs.two, 2),
        (distributed_jobs.four, 4),
        (overlap_jobs.grouped, 2),
        (fault_jobs.two, 2),
        (text_jobs.replicated, 2),
        (text_jobs.replicated, 4),
        (cache_jobs.streamed, 2),
        (cache_jobs.streamed, 4),
    ],
)
def test_processes_compute_what_one_would(job, ranks, tmp_path) -> None:
    ranks_of.run(job, ranks, tmp_path)


def test_without_processes_it_says_what_is_missing() -> None:
    x = torch.zeros(1, 210, 4, 8)
    with pytest.raises(RuntimeError, match="group needs torch"):
        ulysses_attention(x, x, x, 2, grid=distributed_jobs.GRID)


def test_ring_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="top-k is over all key tiles"):
        ring_attention(None, None, None)


def test_the_example_runs_with_two_processes() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(ROOT / "examples" / "ulysses.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        done = run(command, env=environment)
        # gloo's own threads do this when a process ends, once in some thirty runs.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    errors = [float(e) for e in re.findall(r"error (\S+)", done.stdout)]
    assert len(errors) == 2 and max(errors) < 1e-5
