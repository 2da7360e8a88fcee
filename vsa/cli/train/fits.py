# SPDX-License-Identifier: Apache-2.0
"""A law of loss over operations, from few points.

    plain    loss = scale * flops ** -power
    offset   loss = floor + scale * flops ** -power

Both are least squares of the logarithm of the loss. The offset costs a parameter, and a floor that
is far below all losses cannot be told from none. So it is only taken where there are ``ENOUGH``
points and it lowers the corrected information criterion (Hurvich and Tsai, 1989) by ``CLEARLY``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST = 3
"""Points that a plain law needs: two would be met exactly by any."""
ENOUGH = 6
"""Points that an offset needs."""
CLEARLY = 2.0
"""Of the information criterion: less is no reason for another parameter."""
FLOORS = 400
"""Floors that are tried, before the best of them is refined."""

Point = tuple[float, float]
"""FLOPs and loss."""


@dataclass(frozen=True)
class Law:
    """loss = floor + scale * flops ** -power.

    Attributes:
        floor: 0 for a plain law.
        scale: above 0.
        power: above 0 where loss falls.
        points: that it was fitted to.
        flops: the least and the most of them; it says nothing outside.
        error: root mean square of what is left of the logarithm of the loss.
    """

    floor: float
    scale: float
    power: float
    points: int
    flops: tuple[float, float]
    error: float

    def loss(self, flops: float) -> float:
        """At so many operations."""
        return self.floor + self.scale * flops**-self.power

    def flops_for(self, loss: float) -> float | None:
        """Operations until a loss; None where the law never reaches it, or only outside of them."""
        if loss <= self.floor or self.power <= 0:
            return None
        log = (math.log(self.scale) - math.log(loss - self.floor)) / self.power
        low, high = (math.log(x) for x in self.flops)
        slack = 1e-9 * abs(high)
        return math.exp(log) if low - slack <= log <= high + slack else None

    def __str__(self) -> str:
        unit = 10.0 ** round(math.log10(self.flops[1]))
        law = f"{self.scale * unit**-self.power:.4f} (FLOPs / {unit:.0e})^{-self.power:+.3f}"
        return f"{self.floor:.4f} + {law}" if self.floor else law


def fit(points: Sequence[Point]) -> Law | None:
    """The law that the points justify; None for fewer than ``LEAST``, or without two FLOPs.

    Args:
        points: FLOPs and loss, both above 0.
    """
    if len(points) < LEAST or len({flops for flops, _ in points}) < 2:
        return None
    plain = _with_floor(points, 0.0)
    if len(points) < ENOUGH:
        return plain
    highest = min(loss for _, loss in points)
    offset = _with_floor(points, _best(lambda floor: _with_floor(points, floor).error, highest))
    better = _criterion(plain, 3) - _criterion(offset, 4) >= CLEARLY
    return offset if better and offset.power > 0 else plain


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats with fewer or as many operations, by rising FLOPs."""
    found: list[Point] = []
    for flops, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((flops, loss))
    return found


def _with_floor(points: Sequence[Point], floor: float) -> Law:
    """Least squares of log(loss - floor), weighted to be one of log(loss) at first order."""
    xs = [math.log(flops) for flops, _ in points]
    ys = [math.log(loss - floor) for _, loss in points]
    weights = [((loss - floor) / loss) ** 2 for _, loss in points]
    total = sum(weights)
    x0, y0 = (sum(w * z for w, z in zip(weights, zs, strict=True)) / total for zs in (xs, ys))
    spread = sum(w * (x - x0) ** 2 for w, x in zip(weights, xs, strict=True))
    both = sum(w * (x - x0) * (y - y0) for w, x, y in zip(weights, xs, ys, strict=True))
    slope = both / spread
    scale = math.exp(y0 - slope * x0)
    found = Law(floor, scale, -slope, len(points), (math.exp(min(xs)), math.exp(max(xs))), 0.0)
    squares = [math.log(found.loss(flops) / loss) ** 2 for flops, loss in points]
    error = math.sqrt(sum(squares) / len(points))
    return Law(floor, scale, -slope, len(points), found.flops, error)


def _best(error: Callable[[float], float], highest: float) -> float:
    """The floor below ``highest`` with the least error: the best of many, then bisected."""
    floors = [highest * (1 - 10 ** (-4 * n / FLOORS)) for n in range(FLOORS)]
    place = min(range(FLOORS), key=lambda n: error(floors[n]))
    low, high = floors[max(0, place - 1)], floors[min(FLOORS - 1, place + 1)]
    for _ in range(100):  # golden sections would save calls that cost nothing here
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if error(first) <= error(second) else (first, high)
    return (low + high) / 2


def _criterion(law: Law, parameters: int) -> float:
    """Akaike's, corrected for few points; ``parameters`` counts the variance."""
    n = law.points
    correction = 2 * parameters * (parameters + 1) / (n - parameters - 1)
    # Points of a law without any noise are met to rounding, which is no reason to prefer either.
    return n * math.log(max(law.error, 1e-9) ** 2) + 2 * parameters + correction
