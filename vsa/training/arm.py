# SPDX-License-Identifier: Apache-2.0
"""One model in training: its optimizer, its averaged weights, what it cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vsa.training import flow
from vsa.training.attention import ADAPTED
from vsa.training.costs import StepCost, step_cost
from vsa.training.data import Batch
from vsa.training.model import VideoTransformer
from vsa.training.settings import Settings

BETAS = (0.9, 0.95)
"""Of AdamW, as in the paper."""


class Arm:
    """A kind of attention in a run.

    Args:
        settings: of the run.
        kind: of attention.
        device: where it trains.

    Attributes:
        model: the model.
        flops: operations of all steps so far, counted.
        seconds: device time of all steps so far, measured; data and evaluation are not in it.
    """

    def __init__(self, settings: Settings, kind: str, device: torch.device) -> None:
        self.settings, self.kind, self.device = settings, kind, device
        model = VideoTransformer(
            settings.size, kind, settings.video, settings.topk, settings.seed
        ).to(device)
        self.model = model
        decayed = {
            id(p) for n, p in model.named_parameters() if p.ndim == 2 and "modulation" not in n
        }
        parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if (id(p) in decayed) == wanted], "weight_decay": by}
            for wanted, by in ((True, settings.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=BETAS, fused=device.type == "cuda"
        )
        self.average = [p.detach().clone() for p in parameters] if settings.ema else []
        self.flops = self.seconds = 0.0
        self.losses: list[Tensor] = []
        self._costs: dict[float, StepCost] = {}
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._density: float | None = None
        if settings.compiled:
            for block in model.blocks:
                block.compile(fullgraph=True)

    def step(self, batch: Batch, number: int) -> None:
        """Train on a batch; nothing here waits for the device.

        Args:
            batch: what the step sees.
            number: of the step, from 0.
        """
        density = self._prepare(number)
        rate = self.settings.learning_rate * min(1.0, (number + 1) / max(1, self.settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._clock():
            with self.autocast():
                loss = flow.clip_losses(self.model, batch.video, batch.noise, batch.time).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
            self.optimizer.step()
            if self.average:
                now = [p.detach() for p in self.model.parameters()]
                torch._foreach_lerp_(self.average, now, 1 - self.settings.ema)
        self.losses.append(loss.detach())
        self.flops += self.cost(density).total

    def cost(self, density: float) -> StepCost:
        """Counted operations of a step at a density of the fine stage."""
        if density not in self._costs:
            self._costs[density] = step_cost(self.model, self.settings.batch, density)
        return self._costs[density]

    def evaluate(self, held_out: list[Batch], number: int) -> Tensor:
        """Loss of every held-out clip, (clips,) fp32 on the CPU.

        Args:
            held_out: the batches.
            number: steps that were taken, which a ramp's density follows.
        """
        self._prepare(number)
        with torch.no_grad(), self.autocast(), self.averaged():
            losses = [
                flow.clip_losses(self.model, each.video, each.noise, each.time) for each in held_out
            ]
        return torch.cat(losses).cpu()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with averaged weights, if it keeps some."""
        if not self.average:
            yield
            return
        weights = [p.data for p in self.model.parameters()]
        try:
            for parameter, average in zip(self.model.parameters(), self.average, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, own in zip(self.model.parameters(), weights, strict=True):
                parameter.data = own

    def autocast(self) -> torch.autocast:
        """What the model runs under."""
        low = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def settle(self) -> float:
        """Wait for the device and add up what it took; seconds of all steps so far."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self.seconds += sum(begin.elapsed_time(end) for begin, end in self._pending) / 1e3
            self._pending.clear()
        return self.seconds

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs of it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "flops": self.flops,
            "seconds": self.settle(),
            "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, other in zip(self.average, state["average"], strict=True):
            mine.copy_(other)
        self.flops, self.seconds = state["flops"], state["seconds"]
        self.losses = list(state["losses"].to(self.device))

    def _prepare(self, number: int) -> float:
        """The density of a step, and the model set to it."""
        density = self.settings.density_at(self.kind, number)
        if self.kind in ADAPTED and density != self._density:
            self.model.set_topk(density)
            self._density = density
        return density

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Time what is inside: on a GPU by events, which are read later."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begin
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._pending.append(events)
