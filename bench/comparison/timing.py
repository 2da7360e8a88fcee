# SPDX-License-Identifier: Apache-2.0
"""Times of a call that goes round several inputs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from vsa.measure.timing import CALLS_IN_A_ROW, seconds

Item = TypeVar("Item")
FEWEST, MOST = 7, 60
"""Timed repeats, each the mean of up to ten calls in a row."""
RESTS, REST = 7, 0.05
"""Calls after a rest, and how long it is, seconds."""


def rotated(
    call: Callable[[Item], object], items: Sequence[Item], device: torch.device, budget: float
) -> list[float]:
    """Seconds of a call, many times, in about ``budget`` seconds, after warming up on every item.

    Each call gets the next item, so that none finds its inputs in the L2 cache.
    """
    around = itertools.cycle(items)

    def go() -> None:
        call(next(around))

    for _ in items:
        go()
    once = statistics.median(seconds(go, device, 3, calls=1))
    calls = max(1, min(CALLS_IN_A_ROW, int(budget / FEWEST / once)))
    repeats = max(FEWEST, min(MOST, int(budget / calls / once)))
    return seconds(go, device, repeats, calls=calls)


def rested(
    call: Callable[[Item], object], items: Sequence[Item], device: torch.device
) -> list[float]:
    """Seconds of a call on a GPU that has rested.

    A short call ends before the power limit holds the clock down; one of tens of milliseconds does
    not. It is the second of two calls after a pause: what Python does before it runs beside the
    first.
    """
    around = itertools.cycle(items)

    def after_a_rest() -> float:
        time.sleep(REST)
        return seconds(lambda: call(next(around)), device, 1, calls=1)[0]

    return [after_a_rest() for _ in range(RESTS)]
