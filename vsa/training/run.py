# SPDX-License-Identifier: Apache-2.0
"""A run: models of several kinds that train side by side on the same batches.

Every step makes one batch, and each model takes it. So kinds are paired whatever happens, and a
limit of time stops them at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vsa.training import probes
from vsa.training.arm import Arm
from vsa.training.data import Data
from vsa.training.settings import Settings

Row = dict[str, Any]

PROBED = 4
"""Most batches of held-out clips, spread over all, that recall and gates are looked at in."""


class Run:
    """Data, models and results.

    Args:
        settings: the recipe.
        device: where it runs.

    Attributes:
        step: steps that were taken.
        arms: models by kind.
        rows: results, one per kind and evaluation.
        probed: held-out batches that recall and gates are measured on.
        baseline: held-out loss of predicting zero, which untrained models do, by source.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.data = Data(settings, device)
        self.arms = {kind: Arm(settings, kind, device) for kind in settings.kinds}
        self.rows: list[Row] = []
        self.step = 0
        held_out = self.data.held_out
        self.probed = held_out[:: -(-len(held_out) // PROBED)]
        losses = torch.cat([(x.noise - x.video).square().mean((1, 2)) for x in self.data.held_out])
        self.baseline = self._by_source(losses.cpu())

    def train(
        self,
        steps: int | None,
        until: float | None,
        watch: Callable[[int, list[Row]], object] = lambda step, rows: None,
    ) -> None:
        """Go on until a number of steps or a moment, evaluating on the way and in the end.

        Args:
            steps: that the run has in all; None for no limit.
            until: moment of ``time.monotonic`` to be done by; None for no limit. The last
                evaluation is expected to take as long as the longest before.
            watch: called after every step with its number and the rows that it brought; what is
                true ends the run, after an evaluation.
        """
        reserve = 0.0
        if not self.rows:
            begin = time.monotonic()
            watch(self.step, self.evaluate())
            reserve = time.monotonic() - begin
        while steps is None or self.step < steps:
            if until is not None and time.monotonic() + reserve >= until:
                break
            batch = self.data.batch(self.step)
            for arm in self.arms.values():
                arm.step(batch, self.step)
            self.step += 1
            rows: list[Row] = []
            if self.step % self.settings.every == 0:
                self.wait()
                begin = time.monotonic()
                rows = self.evaluate()
                reserve = max(reserve, time.monotonic() - begin)
            if watch(self.step, rows):
                break
        if self.rows[-1]["step"] != self.step:
            watch(self.step, self.evaluate(between=True))

    def evaluate(self, between: bool = False) -> list[Row]:
        """Measure every kind and keep a row of each.

        Args:
            between: whether this is an evaluation that a longer run would not make.
        """
        rows = [self._row(arm, between) for arm in self.arms.values()]
        self.rows += rows
        return rows

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers that each model learns, by kind."""
        return {
            kind: sum(p.numel() for p in arm.model.parameters()) for kind, arm in self.arms.items()
        }

    def wait(self) -> None:
        """Until the device has done what it was told."""
        for arm in self.arms.values():
            arm.settle()

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on; for ``load``."""
        arms = {kind: arm.state() for kind, arm in self.arms.items()}
        return {"step": self.step, "rows": self.rows, "arms": arms}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.step = state["step"]
        # The last evaluation may have been due to the stop alone.
        self.rows = [row for row in state["rows"] if row["step"] % self.settings.every == 0]
        for kind, arm in self.arms.items():
            arm.load(state["arms"][kind])

    def _row(self, arm: Arm, between: bool) -> Row:
        seconds = arm.settle()
        losses = arm.evaluate(self.data.held_out, self.step)
        with arm.autocast(), arm.averaged():
            seen = probes.probe(arm.model, self.probed, self.settings.topk)
        density = self.settings.density_at(arm.kind, self.step)
        cost = arm.cost(density)
        train = torch.stack(arm.losses).mean().item() if arm.losses else None
        if not between:
            arm.losses.clear()
        return {
            "kind": arm.kind,
            "step": self.step,
            "held_out": losses.mean().item(),
            "held_out_by_source": self._by_source(losses),
            "held_out_clips": losses.tolist(),
            "train": train,
            "flops": arm.flops,
            "train_ms": 1e3 * seconds,
            "density": density,
            "step_flops": cost.total,
            "step_flops_attention": cost.attention,
            **seen,
        }

    def _by_source(self, losses: torch.Tensor) -> dict[str, float]:
        """Means of the held-out clips that are generated, and of those that are real."""
        return {
            source: losses[[each == source for each in self.data.sources]].mean().item()
            for source in dict.fromkeys(self.data.sources)
        }
