# SPDX-License-Identifier: Apache-2.0
"""Processes for the tests of several ranks. Forked from one that has imported what takes long."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from distributed import distributed_jobs
from torch.multiprocessing import start_processes

# Not vsa: the process that imports these may start in a clone, whose sources are not compiled.
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "diffusers.models.transformers"]


def run(job: Callable[[int], None], ranks: int, folder: Path) -> None:
    """Calls job(rank) in as many processes, which meet in a file of the folder.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised first.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    arguments = (job, ranks, folder / "store")
    start_processes(distributed_jobs.start, arguments, nprocs=ranks, start_method="forkserver")
