# SPDX-License-Identifier: Apache-2.0
"""Processes for the tests of several ranks, forked from one that has imported what takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import forked
from distributed import distributed_jobs
from torch.multiprocessing import start_processes


def run(job: Callable[[int], None], ranks: int, folder: Path, backend: str = "gloo") -> None:
    """Calls job(rank) in as many processes, which meet in a file of the folder.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised first.
    """
    method = "forkserver" if backend == "gloo" else "spawn"  # what warms up may have begun on a GPU
    if backend == "gloo":
        forked.context()
    arguments = (job, ranks, folder / "store", backend)
    start_processes(distributed_jobs.start, arguments, nprocs=ranks, start_method=method)
