# SPDX-License-Identifier: Apache-2.0
"""Which tiles rows of scores keep, in plain PyTorch: the yardstick of the kernels' choice."""

from __future__ import annotations

import torch
from torch import Tensor

FULL_WEIGHT_BITS = 31
LOG2_E = 1.4426950408889634
EXPONENTIAL = (1488514807, 515782929, 118750172, 19769300, 2029165)
"""2^-f = 1 - f (d1 - f (d2 - ...)), the d times 2^31: csrc/kernels/select/softmax_mass.h."""


def kept_tiles(
    scores: Tensor,
    forced: Tensor | None,
    counts: Tensor,
    most: int,
    mass: float,
    allowed: Tensor | None = None,
) -> Tensor:
    """Forced tiles, then the largest of each row, ties to the lowest column.

    Args:
        scores: (rows, columns).
        forced: (rows, columns) bool or None.
        counts: (rows, 1) int64, the least tiles of a row.
        most: the largest of ``counts``.
        mass: the least share of a row's softmax.
        allowed: (rows, columns) bool, those that may be kept, the forced ones among them; None for
            all. ``counts`` are no more than these.

    Returns:
        (rows, columns) bool.
    """
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mass:
        return _by_mass(scores, forced, counts, mass, allowed)
    if forced is not None:
        scores = scores.masked_fill(forced, float("-inf"))
        counts = counts - forced.sum(-1, keepdim=True)
    last = scores.topk(most).values.gather(-1, (counts - 1).clamp(min=0))
    above, tied = scores > last, scores == last
    if forced is not None:
        tied &= ~forced
    if allowed is not None:
        tied &= allowed
    room = counts - above.sum(-1, keepdim=True)
    kept = above | tied & (tied.cumsum(-1) <= room)
    if forced is not None or allowed is not None:
        kept &= counts > 0
    return kept if forced is None else kept | forced


def _by_mass(
    scores: Tensor, forced: Tensor | None, counts: Tensor, mass: float, allowed: Tensor | None
) -> Tensor:
    order = (scores + 0.0).argsort(stable=True, dim=-1, descending=True)  # + 0.0: -0 becomes 0
    if allowed is not None:
        first = allowed.gather(-1, order).to(torch.uint8)
        order = order.gather(-1, first.argsort(stable=True, dim=-1, descending=True))
    if forced is not None:
        first = forced.gather(-1, order).to(torch.uint8)
        order = order.gather(-1, first.argsort(stable=True, dim=-1, descending=True))
        counts = torch.maximum(counts, forced.sum(-1, keepdim=True))
    weights = softmax_weights(scores)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0)
    sums = weights.gather(-1, order).cumsum(-1)
    target = (sums[:, -1:].double() * mass).ceil().to(torch.int64)
    length = torch.maximum((sums < target).sum(-1, keepdim=True) + 1, counts)
    if allowed is not None:
        length = torch.minimum(length, allowed.sum(-1, keepdim=True))
    place = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, place < length)


def softmax_weights(scores: Tensor) -> Tensor:
    """Shares of each row's softmax as whole numbers, 2**31 for the largest score.

    Integers from the exponent on, so that every machine finds the same: see
    csrc/kernels/select/softmax_mass.h.

    Args:
        scores: (..., columns) fp32 or fp64 without NaN.

    Returns:
        (..., columns) int64.
    """
    top = scores.amax(-1, keepdim=True)
    gap = torch.where(scores == top, 0, top - scores)
    fixed = ((gap * LOG2_E).clamp_(max=33) * 2**24).to(torch.int64)
    whole, fraction = fixed >> 24, (fixed & (1 << 24) - 1) << 8
    tail = torch.zeros_like(fraction)
    for coefficient in (*reversed(EXPONENTIAL), 1 << FULL_WEIGHT_BITS):
        tail = coefficient - (tail * fraction >> 32)
    rounded = tail + ((1 << whole) >> 1) >> whole
    return torch.where(whole < 32, rounded, 0)
