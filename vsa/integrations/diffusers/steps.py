# SPDX-License-Identifier: Apache-2.0
"""Which denoising step a forward pass belongs to: as the user says, or counted by timesteps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vsa import checks
from vsa.integrations.diffusers.passes import OfThread

MOST_CALLS = 4
"""Calls of one step that guidance may need; more are steps that look alike."""


class _Said(OfThread):
    step: int | None = None


_said = _Said()


@contextmanager
def denoising_step(step: int) -> Iterator[None]:
    """Say which denoising step the calls inside belong to, in this thread.

    For schedules whose timesteps do not tell: constant ones, rounded ones, ones of one's own.

    Args:
        step: counted from 0.

    Raises:
        ValueError, TypeError: naming step.
    """
    before, _said.step = _said.step, checks.count("step", step)
    try:
        yield
    finally:
        _said.step = before


def count_steps(
    pipe: Any, step: int, timestep: object, callback_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Count steps of a pipeline: pass it as ``callback_on_step_end``.

    The steps of this thread are then those of the pipeline's loop, whatever its timesteps are.
    """
    last = step + 1 >= getattr(pipe, "num_timesteps", step + 2)
    _said.step = None if last else step + 1
    return callback_kwargs


class Steps(OfThread):
    """The steps of a generation, in each thread another one.

    Attributes:
        step: counted from 0.
        call: of the transformer within this step, counted from 0.
        timestep: the last one.
    """

    step: int = -1
    call: int = 0
    timestep: float | None = None
    warned: bool = False

    def advance(self, timestep: object, rising: bool) -> None:
        """Take note of one forward pass: another step, another call of it, or a new generation.

        Args:
            timestep: a number, or a tensor of which the largest counts.
            rising: whether timesteps rise towards the clean video.
        """
        now = float(timestep.max() if isinstance(timestep, Tensor) else timestep)  # type: ignore[arg-type]
        before, self.timestep = self.timestep, now
        if _said.step is not None:
            self.call = self.call + 1 if _said.step == self.step else 0
            self.step, self.timestep = _said.step, None  # whoever counts next starts anew
            return
        if now == before:  # guidance calls the transformer several times per step
            self.call += 1
        else:
            onwards = before is not None and (now > before) == rising
            self.step, self.call = self.step + 1 if onwards else 0, 0
        rounded = isinstance(timestep, Tensor) and timestep.dtype in (
            torch.bfloat16,
            torch.float16,
        )
        if not self.warned and (rounded or self.call >= MOST_CALLS):
            self.warned = True
            what = (
                f"are rounded to {timestep.dtype}"  # type: ignore[attr-defined]
                if rounded
                else f"were equal in {self.call + 1} calls"
            )
            warnings.warn(
                f"timestep values {what}, so that neighbouring steps can look like one, and "
                "dense_steps, refresh_every or a schedule can take effect at the wrong step: say "
                "the step with vsa.integrations.diffusers.denoising_step(step), or pass "
                "callback_on_step_end=count_steps to the pipeline",
                stacklevel=2,
            )


def timestep_of(call: Mapping[str, Any]) -> object:
    """The timestep among the arguments of a forward pass.

    Raises:
        ValueError: there is none.
    """
    if call.get("timestep") is None:
        raise ValueError("timestep must be given where settings depend on the step, but it is None")
    return call["timestep"]
