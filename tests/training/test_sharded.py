# SPDX-License-Identifier: Apache-2.0
"""A step of the model of ``vsa train`` under FSDP2 and Ulysses is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import ranks as ranks_of
from torch import nn
from training import sharded_jobs

from vsa.distributed import shard_sequence


def test_steps_on_a_mesh_are_those_of_one_process(tmp_path: Path) -> None:
    ranks_of.run(sharded_jobs.four, 4, tmp_path)


def test_a_sequence_needs_processes() -> None:
    with pytest.raises(RuntimeError, match=r"group needs torch\.distributed, which is not"):
        shard_sequence(nn.Linear(2, 2), None)
