# SPDX-License-Identifier: Apache-2.0
"""Tiles for many heads at a given total: for the worst head, for the mean of all, or for a sum.

    maximise  min_h recall_h(n_h)   subject to   sum_h n_h = total,   n_h >= least
    maximise  sum_h recall_h(n_h)   likewise
    minimise  sum_h error_h(n_h)    likewise, the heads of a layer

A level of recall costs each head the fewest tiles that reach it (water filling). Giving the worst
head what raises it, over and over, reaches the highest level that can be paid for, since no head is
ever given more than that level costs it. Bisection over the values that curves take finds most of
the way at once. When the worst can be helped no more, the next worst is.

The sum is best where tiles go wherever the next one brings most. That needs gains that fall, which
neither recall nor error by an imperfect score need have. So gains that rise are averaged with those
before them first (as pool-adjacent-violators does). That makes runs of tiles that are given as a
whole: what each head has then lies on the hull of its curve, and no other shares of as many tiles
are better. Where the next run is longer than what is left, dynamic programming finds the best
shares near these: the best of all where there are at most 128 tiles to share out.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

BAND = 128
"""Tiles by which shares may differ from those on the hull, added up from the first head on."""


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
    """Share out tiles for the greatest mean; arguments, result and errors as in ``water_fill``.

    Curves may fall here. Of equal gains that of the head with fewer tiles comes first.
    """
    heads, most = curves.shape
    _check_total(heads, most, total, least)
    runs = []
    for head, row in enumerate(curves[:, least - 1 :].diff(dim=1).tolist()):
        given = 0
        for gain, count in _falling(row):
            runs.append((-gain / count, given, head, count))
            given += count
    left, found = total - heads * least, torch.full((heads,), least)
    for _, _, head, count in sorted(runs):
        if count > left:
            break
        found[head] += count
        left -= count
    return _within_band(curves, found, left, least) if left else found


def fill_for_error(curves: Tensor, total: int, least: int = 1) -> Tensor:
    """Share out tiles for the least sum of errors (heads, n); else as in ``fill_for_mean``."""
    return fill_for_mean(-curves, total, least)


def _falling(gains: list[float]) -> list[tuple[float, int]]:
    """Sums and lengths of runs such that no later one has a larger average."""
    runs: list[tuple[float, int]] = []
    for gain in gains:
        total, count = gain, 1
        while runs and runs[-1][0] * count < total * runs[-1][1]:
            before, of = runs.pop()
            total, count = total + before, count + of
        runs.append((total, count))
    return runs


def _within_band(curves: Tensor, counts: Tensor, left: int, least: int) -> Tensor:
    """The best shares near some others, with so many tiles more, by dynamic programming.

    Near: what the first heads have together, for any number of heads, is at most ``BAND`` tiles
    (or ``left``) from what they had.
    """
    most, spare = curves.shape[1], int((counts - least).sum()) + left
    band = max(left, min(BAND, spare))  # no head can be farther than what there is to share out
    away = torch.arange(-2 * band, 2 * band + 1)
    sums = torch.full((2 * band + 1,), -math.inf, dtype=torch.float64)
    sums[band] = 0.0
    came_from = []
    for row, count in zip(curves, counts.tolist(), strict=True):
        then = count + away
        kept = row[then.clamp(1, most) - 1].masked_fill((then < least) | (then > most), -math.inf)
        # to, from: what the head keeps with as many tiles as lie between both
        between = kept.flip(0).unfold(0, len(sums), 1).flip(0)
        sums, best = (sums + between).max(1)
        came_from.append(best)
    found, place = counts.clone(), band + left
    for head in reversed(range(len(counts))):
        before = int(came_from[head][place])
        found[head] += place - before
        place = before
    return found


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
