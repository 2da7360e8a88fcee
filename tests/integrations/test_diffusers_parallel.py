# SPDX-License-Identifier: Apache-2.0
"""Transformers whose video is sharded, by diffusers or by hooks of ours: gloo against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
from distributed import ranks as ranks_of
from integrations import joint_jobs, parallel_jobs
from integrations.tiny_transformers import hunyuan

from vsa.integrations.diffusers import apply_vsa


@pytest.mark.parametrize(
    ("job", "ranks"), [(parallel_jobs.two, 2), (joint_jobs.two, 2), (joint_jobs.four, 4)]
)
def test_processes_compute_what_one_would(job: Any, ranks: int, tmp_path: Path) -> None:
    ranks_of.run(job, ranks, tmp_path)


def test_a_group_needs_processes() -> None:
    with pytest.raises(RuntimeError, match=r"group needs torch\.distributed, which is not"):
        apply_vsa(hunyuan()[0], topk=3, group=object())
