# SPDX-License-Identifier: Apache-2.0
"""From dense to sparse while fine-tuning (paper, section 2.4, sparse adaptation)."""

from __future__ import annotations

from dataclasses import dataclass

from vsa.values import checks


@dataclass(frozen=True)
class SparsityRamp:
    """Density (share of key tiles kept) as a staircase over training steps.

    ``ramp(n)`` is ``start`` for the first ``every`` steps, falls by ``step`` every ``every`` steps,
    never rises and reaches ``end`` exactly.

    Args:
        start: density of the first steps, in (0, 1].
        end: density to reach, in (0, start].
        every: training steps between two changes.
        step: density lost at each change, above 0.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    start: float = 1.0
    end: float = 0.1
    every: int = 50
    step: float = 0.03

    def __post_init__(self) -> None:
        for name in ("start", "end", "step"):
            checks.share(name, getattr(self, name))
        if self.end > self.start:
            raise ValueError(
                f"end must not exceed start, but end is {self.end} and start is {self.start}"
            )
        checks.integer("every", self.every, at_least=1)

    def __call__(self, step: int) -> float:
        """Density at a training step, counted from 0; pass it as ``topk``."""
        changes = checks.count("step", step) // self.every
        density = self.start - changes * self.step
        # Rounding must not leave a last, tiny step above the end.
        return float(self.end if density < self.end + 1e-9 else density)
