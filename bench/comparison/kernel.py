# SPDX-License-Identifier: Apache-2.0
"""What every kernel of the comparison offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from comparison.archives import Unavailable
from comparison.problem import Inputs, Order, Problem
from vsa.values.precision import Precision


class Kernel(ABC):
    """One implementation of attention, forward and backward.

    Nothing but ``forward`` and ``backward`` is timed.

    Attributes:
        title: how tables call it.
        dense: whether it attends everything.
        own_pattern: whether it chooses tiles itself.
        gpu_only: whether it refuses a CPU.
        order: the order of tokens that it wants.
        precision: what its results are held to; what is not native has a forward alone.
        archives: of bench/fetch_peers.py or bench/compile_peers.py, without which it does not load.
        plan_seconds: what its own planner took for the last pattern; None where it has none.
    """

    title: ClassVar[str]
    dense: ClassVar[bool] = False
    own_pattern: ClassVar[bool] = False
    gpu_only: ClassVar[bool] = False
    order: ClassVar[Order] = "raster"
    precision: ClassVar[Precision] = "native"
    archives: ClassVar[tuple[str, ...]] = ()
    plan_seconds: float | None = None

    def __init__(self, device: torch.device, folders: Sequence[Path]):
        """Load it.

        Raises:
            Unavailable: it cannot run here.
        """
        if self.gpu_only:
            needs_gpu(device)
        self.device = device
        self.load(folders)

    @abstractmethod
    def load(self, folders: Sequence[Path]) -> None:
        """Find libraries, in these folders if they come as archives."""

    @abstractmethod
    def plan(self, problem: Problem) -> None:
        """Bring the sparsity pattern into the kernel's own form."""

    @abstractmethod
    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        """Out like q; log-sum-exp (1, heads, tokens) if it returns one; what backward needs."""

    @abstractmethod
    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients like q, k and v."""

    def pattern(self, kind: str) -> str | None:
        """How rows call the pattern that it ran, where the case has this kind; None if dense."""
        return None if self.dense else "its own" if self.own_pattern else kind

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def needs_gpu(device: torch.device) -> None:
    """Refuse a CPU.

    Raises:
        Unavailable: on anything but a CUDA GPU.
    """
    if device.type != "cuda":
        raise Unavailable(f"it needs a CUDA GPU, but this run is on {device.type}")
