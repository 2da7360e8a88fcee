# SPDX-License-Identifier: Apache-2.0
"""Where kernels run: their source on a CPU, and a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from vsa.backends import BACKENDS, Request
from vsa.backends.kernels import KernelBackend
from vsa.backends.kernels.machine import Machine


def backend_on(device: str) -> KernelBackend:
    """Our own kernels for tensors of a device."""
    backend = BACKENDS["hopper" if device == "cuda" else "emulated"]
    assert isinstance(backend, KernelBackend)
    return backend


def machine_of(device: str) -> Machine:
    """What runs calls of the kernels there."""
    return backend_on(device).machine


MACHINES = [
    pytest.param("cpu", id="source"),
    pytest.param(
        "cuda",
        id="hopper",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available()
            or BACKENDS["hopper"].why_not(Request("cuda")) is not None,
            reason="needs a Hopper GPU",
        ),
    ),
]
on_both = pytest.mark.parametrize("machine", MACHINES)
