# SPDX-License-Identifier: Apache-2.0
"""``vsa wan`` on several GPUs: one process for each, and the sequence shared out by diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes that denoise together.

    Attributes:
        count: of them.
        rank: of this one.
        device: its own.
    """

    count: int
    rank: int
    device: torch.device

    def share(self, xs: Sequence[Tensor]) -> None:
        """Give tensors the numbers that the first process has."""
        if self.count > 1:
            for x in xs:
                dist.broadcast(x, 0)

    def choice_of_the_first(self, value: Value) -> Value:
        """What the first process has, on all of them."""
        if self.count == 1:
            return value
        holder: list[Any] = [value]
        dist.broadcast_object_list(holder, 0)
        return holder[0]

    def parallelise(self, transformer: Any) -> None:
        """Share out the sequence of a WanTransformer3DModel, by diffusers' own parallelism."""
        if self.count == 1:
            return
        mesh = init_device_mesh(
            self.device.type, (1, self.count), mesh_dim_names=("ring", "ulysses")
        )
        # The rest of its plan is for a time per token, which this model is not given; where there
        # is none diffusers warns by a method that only transformers gives to loggers.
        plan = {name: part for name, part in transformer._cp_plan.items() if name}
        with _counted(self.device):
            transformer.enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=self.count, mesh=mesh), cp_plan=plan
            )


@contextmanager
def joined(ranks: int | None, device: torch.device) -> Iterator[Team]:
    """This process among those that torchrun has started, or alone.

    Args:
        ranks: how many there must be; None for as many as there are.
        device: what kind each of them computes on.

    Raises:
        ValueError: another number of processes, or fewer GPUs.
    """
    if not is_launched():
        yield Team(1, 0, device)
        return
    ours = not dist.is_initialized()
    local = dist.get_node_local_rank(0)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"one GPU for each process is needed, but there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if ours:
        own = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if own else "gloo", device_id=own)
    try:
        count = dist.get_world_size()
        if ranks not in (None, count):
            raise ValueError(f"there are {count} processes, but {ranks} were asked for")
        yield Team(count, dist.get_rank(), device)
    finally:
        if ours:
            dist.destroy_process_group()


def is_launched() -> bool:
    """Whether this process is one of several."""
    return dist.is_initialized() or dist.is_torchelastic_launched()


def launch(ranks: int) -> int:
    """Run this command once more, in as many processes; the exit status of all."""
    start = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    return subprocess.run([sys.executable, *start, "-m", "vsa", *sys.argv[1:]]).returncode


def why_not(ranks: int, heads: int, tokens: int) -> str | None:
    """What keeps so many processes from sharing out a video, in words, or None."""
    for what, count in (("heads", heads), ("tokens", tokens)):
        if count % ranks:
            return f"{ranks} processes cannot share out {count:,} {what} evenly"
    return None


@contextmanager
def _counted(device: torch.device) -> Iterator[None]:
    """An accelerator for diffusers to count, which it does where the mesh is one of CPUs, too."""
    count = torch.accelerator.device_count
    if device.type == "cpu":
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All weights and buffers."""
    return [x.data for x in (*model.parameters(), *model.buffers())]
