# SPDX-License-Identifier: Apache-2.0
"""Which denoising step a forward pass belongs to: as the user says, or counted.

Counting goes by timesteps, and where two are equal by what else the transformer is given: guidance
works on the latents of its step. Where that does not decide, a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vsa.integrations.diffusers.passes import OfThread
from vsa.values import checks

MOST_CALLS = 4
"""Calls of one step that guidance may need; more are steps that look alike."""
MIDDLE = 900.0
"""Of timesteps that fall from 1000: what begins below may be the second half of a generation."""
LARGEST_OTHER = 2.0
"""Of timesteps that fall from elsewhere: flows from 1, Cosmos from log(80) / 4."""
SAMPLED = 64
"""Values by which latents are told apart."""

Identities = dict[tuple[int, int, int], StorageWeakRef]


class _Said(OfThread):
    """What was said of this thread's steps.

    Attributes:
        step: inside of ``denoising_step``.
        next: the step after the last that a pipeline's callback knows to have ended.
        ended: generations that callbacks know to have ended.
        counted: the step that the last pass was taken for, if any since the last callback.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.next: int | None = None
        self.ended = 0
        self.counted: int | None = None


_said = _Said()


@contextmanager
def denoising_step(step: int) -> Iterator[None]:
    """Say which denoising step the calls inside belong to, in this thread.

    For schedules whose timesteps do not tell: constant ones, rounded ones, ones of one's own.

    Args:
        step: counted from 0; a smaller one than before begins a new generation.

    Raises:
        ValueError, TypeError: naming step.
    """
    before, _said.step = _said.step, checks.count("step", step)
    try:
        yield
    finally:
        _said.step = before


def step_is_said() -> bool:
    """Whether this thread is inside of ``denoising_step``."""
    return _said.step is not None


def count_steps(
    pipe: Any, step: int, timestep: object, callback_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Count steps of a pipeline: pass it as ``callback_on_step_end``.

    The steps of this thread are then those of the pipeline's loop, whatever its timesteps are.

    Raises:
        RuntimeError: the step that has ended had been taken for another one.
    """
    last = step + 1 >= getattr(pipe, "num_timesteps", step + 2)
    counted, _said.counted = _said.counted, None
    wrong = counted is not None and counted != step
    _said.next = None if last or wrong else step + 1
    _said.ended += last or wrong
    if wrong:
        raise RuntimeError(
            f"step {step} of the pipeline was taken for step {counted}, perhaps because an earlier "
            "generation in this thread broke off: run the pipeline again"
        )
    return callback_kwargs


@dataclass(frozen=True, eq=False)
class _Given:
    """What a call of the transformer was given, as far as it tells steps with equal timesteps.

    Attributes:
        latents: some of their values.
        timestep: which tensor it was, if it was one.
        others: which tensors the other arguments were.
        rounded: whether the timestep has 16 bits, or is a whole number, as UniPC's are.
    """

    latents: Tensor
    timestep: Identities
    others: Identities
    rounded: bool

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> _Given:
        timestep, latents = call["timestep"], call["hidden_states"]
        others = [x for name, x in call.items() if name not in ("timestep", "hidden_states")]
        values = latents.detach()[0].flatten()  # LTX-2 guides with batches of other sizes
        return cls(
            values[:: max(1, len(values) // SAMPLED)].nan_to_num().clone(),
            _identities([timestep]),
            _identities(others),
            isinstance(timestep, Tensor) and timestep.dtype not in (torch.float32, torch.float64),
        )

    def same_latents(self, earlier: _Given) -> bool:
        """Whether both calls had the same; reading it waits for the device."""
        theirs = earlier.latents.to(self.latents)
        return torch.equal(self.latents, theirs)

    def follows(self, earlier: _Given) -> bool:
        """Whether this is the next step, whose timestep was rounded to the one before.

        Guidance is given the very same timestep, or the same latents and another text.
        """
        if not self.rounded or self.timestep.keys() == earlier.timestep.keys():
            return False
        return self.others.keys() == earlier.others.keys() or not self.same_latents(earlier)


def _identities(values: Iterable[object]) -> Identities:
    """Which tensors these are: no other has the identity while its storage is referred to."""
    found = {}
    for x in values:
        if isinstance(x, Tensor):
            storage = StorageWeakRef(x.untyped_storage())
            found[storage.cdata, x.data_ptr(), 0 if x.is_inference() else x._version] = storage
    return found


class Steps(OfThread):
    """The steps of a generation, in each thread another one.

    Attributes:
        step: counted from 0.
        call: of the transformer within this step, counted from 0.
        timestep: the last one.
        generation: changes whenever a new one begins.
        told: doubts that a warning has told of.
    """

    def __init__(self) -> None:
        self.step = -1
        self.call = 0
        self.timestep: float | None = None
        self.generation = 0
        self.told: frozenset[str] = frozenset()
        self._ended = 0
        self._given: _Given | None = None

    def advance(self, call: Mapping[str, Any], rising: bool) -> None:
        """Take note of one forward pass: another step, another call of it, or a new generation.

        Args:
            call: the arguments of the transformer's forward, by name.
            rising: whether timesteps rise towards the clean video.
        """
        if _said.step is not None:
            self._go_to(_said.step)
            self.timestep = None  # whoever counts next starts anew
        else:
            self._count(call, rising)
            _said.counted = self.step

    def _count(self, call: Mapping[str, Any], rising: bool) -> None:
        timestep = timestep_of(call)
        now = _noisiest(timestep, rising)
        before, self.timestep = self.timestep, now
        earlier, self._given = self._given, _Given.of(call)
        over, self._ended = self._ended != _said.ended, _said.ended
        moved = before is not None and now != before
        onwards = moved and (now > before) == rising  # type: ignore[operator]
        if before is None or earlier is None or over:
            self._begin()
        elif moved and not onwards:
            _said.next = None  # of a generation that broke off
            self._begin()
        elif _said.next is not None:
            self._go_to(_said.next)
        elif onwards or self._given.follows(earlier):
            self._go_to(self.step + 1)
        else:
            self._go_to(self.step)
            if self.call >= MOST_CALLS or not self._given.same_latents(earlier):
                self._doubt(
                    "equal",
                    f"timestep values were equal in {self.call + 1} calls that do not look like "
                    f"guidance, and are all taken for step {self.step}",
                )
        if before is None and not rising and LARGEST_OTHER < now < MIDDLE:
            self._doubt(
                "first",
                f"timestep {now:.6g} is the first, and is taken for step 0 (where another "
                "transformer runs before this one, give both to apply_vsa in one list)",
            )

    def _doubt(self, kind: str, what: str) -> None:
        if kind in self.told:
            return
        self.told |= {kind}
        warnings.warn(
            f"{what}, so that dense_steps, refresh_every or a schedule can take effect at the "
            "wrong step: say the step with vsa.integrations.diffusers.denoising_step(step), or "
            "pass callback_on_step_end=count_steps to the pipeline",
            stacklevel=2,
        )

    def _begin(self) -> None:
        self.generation += 1
        self.step, self.call = 0, 0

    def _go_to(self, step: int) -> None:
        if step < self.step:
            self.generation += 1
        self.call = self.call + 1 if step == self.step else 0
        self.step = step


def _noisiest(timestep: object, rising: bool) -> float:
    """Of several timesteps, as tokens or frames may have, the one furthest from the clean video."""
    if isinstance(timestep, Tensor):
        return float(timestep.min() if rising else timestep.max())
    return float(timestep)  # type: ignore[arg-type]


def timestep_of(call: Mapping[str, Any]) -> object:
    """The timestep among the arguments of a forward pass.

    Raises:
        ValueError: there is none.
    """
    if call.get("timestep") is None:
        raise ValueError("timestep must be given where settings depend on the step, but it is None")
    return call["timestep"]
