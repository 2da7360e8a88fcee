# SPDX-License-Identifier: Apache-2.0
"""Tiles for many heads at a given total: for the worst head, or for the mean of all.

    maximise  min_h recall_h(n_h)   subject to   sum_h n_h = total,   n_h >= least
    maximise  sum_h recall_h(n_h)   likewise

A level of recall costs each head the fewest tiles that reach it (water filling). Giving the worst
head what raises it, over and over, reaches the highest level that can be paid for, since no head is
ever given more than that level costs it. Bisection over the values that curves take finds most of
the way at once. When the worst can be helped no more, the next worst is.

The sum is greatest where tiles go wherever the next one brings most. That needs gains that fall,
which recall by an imperfect score need not have, so gains that rise are averaged with those before
them first (as pool-adjacent-violators does): exact but for the last such run, which may be cut.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def water_fill(curves: Tensor, total: int, least: int = 1) -> Tensor:
    """Share out tiles.

    Args:
        curves: (heads, n) fp64 on the CPU; what a head keeps with 1 to n tiles, never falling.
        total: tiles to share out, from heads * least to heads * n.
        least: tiles that every head has, from 1 to n.

    Returns:
        (heads,) int64 that add up to ``total``.

    Raises:
        ValueError: a total that cannot be shared out.
    """
    heads, most = curves.shape
    _check_total(heads, most, total, least)
    curves = curves.contiguous()
    levels = curves.flatten().unique()
    low, high = 0, len(levels)  # every head reaches levels[0] with one tile
    while high - low > 1:
        middle = (low + high) // 2
        if int(_counts_at(curves, levels[middle], least).sum()) <= total:
            low = middle
        else:
            high = middle
    counts = _counts_at(curves, levels[low], least)
    return _share_out(curves, counts, total - int(counts.sum()))


def fill_for_mean(curves: Tensor, total: int, least: int = 1) -> Tensor:
    """Share out tiles for the greatest mean; arguments, result and errors as in ``water_fill``."""
    heads, most = curves.shape
    _check_total(heads, most, total, least)
    gains = torch.zeros(heads, most - least, dtype=torch.float64)
    for head, row in enumerate(curves[:, least - 1 :].diff(dim=1).tolist()):
        gains[head] = torch.tensor(_falling(row), dtype=torch.float64)
    order = gains.flatten().argsort(descending=True, stable=True)[: total - heads * least]
    of_head = torch.div(order, max(1, most - least), rounding_mode="floor")
    return least + of_head.bincount(minlength=heads)


def _falling(gains: list[float]) -> list[float]:
    """Averages of runs such that no later one is larger."""
    runs: list[tuple[float, int]] = []
    for gain in gains:
        total, count = gain, 1
        while runs and runs[-1][0] * count < total * runs[-1][1]:
            before, of = runs.pop()
            total, count = total + before, count + of
        runs.append((total, count))
    return [total / count for total, count in runs for _ in range(count)]


def _counts_at(curves: Tensor, level: Tensor, least: int) -> Tensor:
    """The fewest tiles with which each head reaches a level, all where it never does."""
    targets = level.expand(len(curves), 1).contiguous()
    counts = torch.searchsorted(curves, targets, side="left")[:, 0] + 1
    return counts.clamp(min=least, max=curves.shape[1])


def _share_out(curves: Tensor, counts: Tensor, left: int) -> Tensor:
    """Give what is left, first to whoever keeps least and can be given more that helps."""
    most = curves.shape[1]
    found = counts.tolist()
    rows = curves.tolist()
    worst = [(row[found[head] - 1], head) for head, row in enumerate(rows)]
    heapq.heapify(worst)
    while left and worst:
        now, head = heapq.heappop(worst)
        row, count = rows[head], found[head]
        more = next((n for n in range(count, min(most, count + left)) if row[n] > now), None)
        if more is None:  # nothing that is left helps this head
            continue
        left -= more + 1 - count
        found[head] = more + 1
        heapq.heappush(worst, (row[more], head))
    for head in sorted(range(len(found)), key=lambda h: rows[h][found[h] - 1]):
        given = min(left, most - found[head])  # changes nothing that was measured
        found[head] += given
        left -= given
    return torch.tensor(found)


def _check_total(heads: int, most: int, total: int, least: int) -> None:
    if not heads * least <= total <= heads * most:
        raise ValueError(
            f"total must be from {heads * least} to {heads * most} for {heads} heads of {least} to "
            f"{most} tiles, but it is {total}"
        )
