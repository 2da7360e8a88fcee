# SPDX-License-Identifier: Apache-2.0
"""Budgets that change: over training steps (paper, section 2.4), and over denoising steps."""

from __future__ import annotations

import json
import numbers
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vsa.values import checks
from vsa.values.budget import LayerBudget, TopK, TopP, check
from vsa.values.budgets import Budgets, read_json

FORMAT = "vsa step schedule"
"""What the JSON of a schedule says of itself."""


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


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """Budgets by denoising step: what each step keeps, from the first step that is named on.

    ``vsa.StepSchedule({0: None, 4: 0.3, 12: 0.1})`` is dense in steps 0 to 3, keeps 30 % of the
    tiles in steps 4 to 11, and 10 % from step 12 on. Early steps decide what is in a video, so they
    are what more tiles are usually spent on. Pass it to ``apply_vsa`` as ``topk``.

    Args:
        steps: from first steps, one of which is 0, to budgets: a number or share of tiles, a
            ``vsa.TopP``, one number for each head, ``vsa.Budgets`` of all layers, or None for dense
            attention.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    steps: Mapping[int, TopK | Budgets | None]

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Mapping) or 0 not in self.steps:
            raise ValueError(
                f"steps must map first steps to budgets, and 0 must be among them, but they are "
                f"{self.steps!r:.60}"
            )
        steps: dict[int, TopK | Budgets | None] = {}
        for step, budget in self.steps.items():
            first = checks.count("a key of steps", step)
            steps[first] = budget
            if isinstance(budget, tuple):
                checks.not_empty(f"steps[{step}]", budget)
                check(budget, len(budget))
                steps[first] = tuple(map(checks.plain_number, budget))
            elif isinstance(budget, TopP):
                check(budget, heads=1)
            elif isinstance(budget, numbers.Real):
                check(budget, heads=1)
                steps[first] = checks.plain_number(budget)
            elif budget is not None and not isinstance(budget, (LayerBudget, Budgets)):
                raise TypeError(
                    f"steps[{step}] must be None, a number, a vsa.TopP, a tuple with a number per "
                    f"head, or vsa.Budgets, but it is {budget!r:.60}"
                )
        object.__setattr__(self, "steps", dict(sorted(steps.items())))

    def at(self, step: int) -> TopK | Budgets | None:
        """What a denoising step, counted from 0, keeps."""
        checks.count("step", step)
        starts = list(self.steps)
        return self.steps[starts[bisect_right(starts, step) - 1]]

    def __call__(self, layer: int, step: int) -> TopK | Budgets | None:
        """The same; what ``apply_vsa`` calls for every layer."""
        return self.at(step)

    def save(self, path: Path | str) -> None:
        """Write a JSON file."""
        steps = [{"from": step, "topk": _as_json(each)} for step, each in self.steps.items()]
        Path(path).write_text(json.dumps({"format": FORMAT, "steps": steps}, indent=1))

    @classmethod
    def load(cls, path: Path | str) -> StepSchedule:
        """Read what ``save`` wrote.

        Raises:
            ValueError: another file, or none.
        """
        content = read_json(path)
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            steps = {e["from"]: _from_json(e["topk"], str(path)) for e in content["steps"]}
            if len(steps) != len(content["steps"]):
                raise ValueError("a step is named twice")
            return cls(steps)
        except (KeyError, TypeError, ValueError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} must hold a vsa.StepSchedule, but {said}") from None

    def __repr__(self) -> str:
        each = (f"{step}: {budget!r}" for step, budget in self.steps.items())
        return f"StepSchedule({{{', '.join(each)}}})"


def _as_json(budget: TopK | Budgets | None) -> Any:
    if isinstance(budget, Budgets):
        return budget.as_json()
    if isinstance(budget, LayerBudget):
        return {"counts": list(budget.counts), "num_tiles": budget.num_tiles}
    return asdict(budget) if isinstance(budget, TopP) else budget


def _from_json(content: Any, source: str) -> TopK | Budgets | None:
    if not isinstance(content, dict):
        return tuple(content) if isinstance(content, list) else content
    if "mass" in content:
        return TopP(**content)
    if "counts" in content:
        return LayerBudget(tuple(content["counts"]), content["num_tiles"])
    return Budgets.from_json(content, source)
