# SPDX-License-Identifier: Apache-2.0
"""Machines that take padded tiles."""

from __future__ import annotations

import pytest

from vsa.backends import BACKENDS, Request


@pytest.fixture
def machine(machine: tuple[str, str]) -> tuple[str, str]:
    """As everywhere, without those whose kernels do not take padded tiles."""
    backend, device = machine
    if (reason := BACKENDS[backend].why_not(Request(device, padded=True))) is not None:
        pytest.skip(f"{backend}: {reason}")
    return machine
