# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, counted: attention by ``vsa.flops``, and the rest.

Linear layers cost six operations per weight and token, two forward and four backward. Norms,
activations and the optimizer are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vsa.cost import flops
from vsa.training.attention import FIXED
from vsa.training.model import HEAD_DIM, VideoTransformer


@dataclass(frozen=True)
class StepCost:
    """Operations of a step, forward and backward, a multiply-add as two.

    Attributes:
        attention: everything between the projections: means, choice, products, gates.
        rest: linear layers, those of the gates included.
    """

    attention: float
    rest: float

    @property
    def total(self) -> float:
        """Both."""
        return self.attention + self.rest


def step_cost(model: VideoTransformer, batch: int, density: float) -> StepCost:
    """Count one step.

    Args:
        model: of any kind.
        batch: clips.
        density: share of the key tiles that the fine stage keeps at this step.
    """
    tokens = batch * model.grid.tokens
    linear = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            rows = batch if name.startswith("time_") else tokens
            linear += 6 * rows * layer.weight.numel()
    heads = sum(block.attention.heads for block in model.layers)
    return StepCost(_attention(model.kind, model, heads, batch, density), linear)


def _attention(kind: str, model: VideoTransformer, heads: int, batch: int, density: float) -> float:
    cost = flops(model.grid, heads, HEAD_DIM, density or 1.0, batch=batch)
    if kind == "full":
        return cost.full
    if kind in FIXED:
        return cost.fine
    if kind == "coarse":
        return cost.coarse + cost.combine
    choice = cost.select if density < 1 else 0.0
    if kind == "fine":  # means of q and k, forward alone
        means = 2.0 * batch * heads * HEAD_DIM * model.grid.tokens if density < 1 else 0.0
        return means + choice + cost.fine
    return cost.coarse + choice + cost.fine + cost.combine
