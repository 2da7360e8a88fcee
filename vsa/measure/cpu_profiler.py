# SPDX-License-Identifier: Apache-2.0
"""PyTorch's profiler on a CPU, without the lines that it prints about itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEVEL = "KINETO_LOG_LEVEL"
"""The variable that its library reads when it starts; there is no call that sets it."""
SILENT = "99"


@contextmanager
def cpu_profile(profile_memory: bool = False) -> Iterator[torch.profiler.profile]:
    """Profile what runs inside.

    The environment is as it was when this ends; a level that the user has set counts.

    Args:
        profile_memory: whether to note the tensors that are made and freed.
    """
    unset = LEVEL not in os.environ
    os.environ.setdefault(LEVEL, SILENT)
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=profile_memory) as found:
            yield found
    finally:
        if unset:
            os.environ.pop(LEVEL, None)
