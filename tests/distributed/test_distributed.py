# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with 2 and 4 gloo processes against one process, in fp64."""

from __future__ import annotations

import re

import forked
import pytest
import torch
import torch.distributed as dist
from distributed import cache_jobs, distributed_jobs, example_jobs, fault_jobs, overlap_jobs
from distributed import ranks as ranks_of
from integrations import text_jobs
from torch.multiprocessing import start_processes

from vsa.distributed import ring_attention, ulysses_attention


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


def test_the_example_runs_with_two_processes(tmp_path) -> None:
    """As by torchrun, whose agent holds the store that they meet in."""
    forked.context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (2, store.port, tmp_path)
    start_processes(example_jobs.start, arguments, nprocs=2, start_method="forkserver")
    printed = "".join((tmp_path / str(rank)).read_text() for rank in range(2))
    errors = [float(e) for e in re.findall(r"rank \d: 20\d of 407 tokens, error (\S+)", printed)]
    assert len(errors) == 2 and max(errors) < 1e-5
