# SPDX-License-Identifier: Apache-2.0
"""Where the routing kernels run: their source on a CPU, and a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from vsa.backends import routing

MACHINES = [
    pytest.param("cpu", id="source"),
    pytest.param(
        "cuda",
        id="hopper",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or not routing.run_on(torch.device("cuda", 0)),
            reason="needs a Hopper GPU",
        ),
    ),
]
on_both = pytest.mark.parametrize("machine", MACHINES)
