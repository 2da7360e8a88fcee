# SPDX-License-Identifier: Apache-2.0
"""What runs calls of ``vsa._C``: a GPU, or the emulator on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from vsa import _C


class Machine(Protocol):
    """Runs the kernels of a call. Addresses in it must outlive the run."""

    def run(self, call: Any, device: torch.device) -> None:
        """All kernels of a call."""

    def run_rows(self, call: Any, device: torch.device) -> None:
        """The pass over tokens of a backward call, which comes before ``run``."""

    def run_means(self, call: Any, device: torch.device) -> None:
        """The pass over means of a tail's backward, which comes before that of the fine stage."""

    def at_a_time(self, device: torch.device) -> int:
        """Blocks of a persistent kernel."""

    def run_program(
        self, program: _C.Program, addresses: Sequence[int], device: torch.device
    ) -> None:
        """All prepared calls of a program, on tensors at these addresses."""


def _check(device: torch.device, wanted: str, backend: str) -> None:
    """Kernels read addresses: those of another kind of device are no memory of theirs.

    Raises:
        ValueError: tensors of another device, which an operator alone can bring here.
    """
    if device.type != wanted:
        raise ValueError(
            f"backend {backend!r} takes tensors on {wanted} devices, but they are on {device}"
        )


class Gpu:
    """The current stream of the tensors' device."""

    def run(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run``."""
        _check(device, "cuda", "hopper")
        call.launch(device.index, torch.cuda.current_stream(device).cuda_stream)

    def run_rows(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run_rows``."""
        _check(device, "cuda", "hopper")
        call.launch_rows(device.index, torch.cuda.current_stream(device).cuda_stream)

    def run_means(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run_means``."""
        _check(device, "cuda", "hopper")
        call.launch_means(device.index, torch.cuda.current_stream(device).cuda_stream)

    def at_a_time(self, device: torch.device) -> int:
        """See ``Machine.at_a_time``."""
        return torch.cuda.get_device_properties(device).multi_processor_count

    def run_program(
        self, program: _C.Program, addresses: Sequence[int], device: torch.device
    ) -> None:
        """See ``Machine.run_program``."""
        _check(device, "cuda", "hopper")
        # What current_stream(device).cuda_stream says, without an object of three microseconds.
        program.launch(addresses, device.index, torch._C._cuda_getCurrentRawStream(device.index))


@dataclass
class Emulator:
    """The kernels' source on a CPU.

    Attributes:
        blocks: of the persistent grid; two are enough for each to have several work tiles.
        seed: of the schedule: in which order warps run, and when copies and products land.
    """

    blocks: int = 2
    seed: int = 0

    def run(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run``."""
        _check(device, "cpu", "emulated")
        call.emulate(self.blocks, self.seed)

    def run_rows(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run_rows``."""
        _check(device, "cpu", "emulated")
        call.emulate_rows(self.blocks, self.seed)

    def run_means(self, call: Any, device: torch.device) -> None:
        """See ``Machine.run_means``."""
        _check(device, "cpu", "emulated")
        call.emulate_means(self.blocks, self.seed)

    def at_a_time(self, device: torch.device) -> int:
        """See ``Machine.at_a_time``."""
        return self.blocks

    def run_program(
        self, program: _C.Program, addresses: Sequence[int], device: torch.device
    ) -> None:
        """See ``Machine.run_program``."""
        _check(device, "cpu", "emulated")
        program.emulate(addresses, self.blocks, self.seed)
