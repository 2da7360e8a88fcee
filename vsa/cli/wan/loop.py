# SPDX-License-Identifier: Apache-2.0
"""The denoising loop of ``vsa wan``, timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from vsa.cli.wan.parts import in_ranges
from vsa.integrations.diffusers.compiled import uncompiled
from vsa.measure.nvtx_ranges import record
from vsa.measure.timing import peak_memory

FLOW_SHIFT = 3.0
"""Of Wan's scheduler at 480p."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A transformer, what it starts from, and how it is called.

    Attributes:
        transformer: a WanTransformer3DModel.
        noise: (B, 16, T, H, W) fp32 latents.
        text: (passes, tokens, text_dim): the prompt, and with guidance what to lead away from.
        steps: denoising steps.
        guidance: its scale, None for one pass per step.
    """

    transformer: Any
    noise: Tensor
    text: Tensor
    steps: int
    guidance: float | None = None

    def scheduler(self) -> Any:
        """Wan's scheduler at the beginning of a video."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        )
        scheduler.set_timesteps(self.steps, device=self.noise.device)
        return scheduler

    def flow(self, video: Tensor, timestep: Tensor) -> Tensor:
        """The transformer's prediction for one step, (B, 16, T, H, W) in its own type."""
        batch = len(video)
        flows = [
            self.transformer(
                hidden_states=video.to(self.text.dtype),
                timestep=timestep.expand(batch),
                encoder_hidden_states=text.expand(batch, -1, -1),
                return_dict=False,
            )[0]
            for text in self.text
        ]
        if self.guidance is None:
            return flows[0]
        return flows[1] + self.guidance * (flows[0] - flows[1])

    def denoise(self, each: Callable[[], object], limit: int | None = None) -> Tensor:
        """From noise to video; ``each`` is called when a step has been asked of the device.

        Args:
            each: told of every step.
            limit: stop after so many steps.
        """
        scheduler, video = self.scheduler(), self.noise
        for timestep in scheduler.timesteps[:limit]:
            flow = self.flow(video, timestep)
            video = scheduler.step(flow, timestep, video, return_dict=False)[0]
            each()
        return video


@dataclass(frozen=True, eq=False)
class Run:
    """What one denoising loop took.

    Attributes:
        warm_up: seconds of the steps before it, compilation included.
        steps: seconds of every step.
        total: seconds from noise to video.
        memory: the most bytes held in a step beyond weights and latents.
        stages: seconds of one more step by range: those of ``vsa.cli.wan.parts`` and the stages
            of ``vsa.measure.stage_hooks``; of a step without torch.compile.
        video: (B, 16, T, H, W) fp32, the result.
    """

    warm_up: float
    steps: list[float]
    total: float
    memory: int
    stages: dict[str, float]
    video: Tensor


@torch.no_grad()
def run(denoiser: Denoiser, warm_up_steps: int, each: Callable[[], object]) -> Run:
    """Warm up, measure memory, run the loop, then take one more step apart.

    Args:
        denoiser: what to run.
        warm_up_steps: untimed steps before, enough of them to meet every kind of step.
        each: told of every step of the loop.
    """
    device = denoiser.noise.device
    start = time.perf_counter()
    denoiser.denoise(lambda: None, limit=warm_up_steps)
    _synchronize(device)
    warm_up = time.perf_counter() - start
    last = denoiser.scheduler().timesteps[warm_up_steps - 1]
    _, memory = peak_memory(lambda: denoiser.flow(denoiser.noise, last), device)

    clock = _Clock(device)
    _synchronize(device)
    start = time.perf_counter()
    clock.mark()

    def marked() -> None:
        clock.mark()
        each()

    video = denoiser.denoise(marked)
    _synchronize(device)
    total = time.perf_counter() - start

    # To where the warm-up ended: the loop's end may be another kind of step.
    denoiser.denoise(lambda: None, limit=warm_up_steps)
    with uncompiled(denoiser.transformer):
        stages = record(
            lambda open_range: in_ranges(
                denoiser.transformer, lambda: denoiser.flow(denoiser.noise, last), open_range
            ),
            device,
            repeats=1,
        )
    return Run(warm_up, clock.seconds(), total, memory, stages, video)


@dataclass(eq=False)
class _Clock:
    """Moments on a device, noted without waiting for it."""

    device: torch.device
    moments: list[Any] = field(default_factory=list)

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def seconds(self) -> list[float]:
        """Between one moment and the next."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
