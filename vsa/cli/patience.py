# SPDX-License-Identifier: Apache-2.0
"""How long a CPU will take, said before it takes it."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

import torch
from torch.nn import functional

import vsa
from vsa.measure.shapes import Shape

PROBE_TOKENS = 2048
"""Dense attention over them takes a CPU well under a second."""
LONG = 180.0
"""Seconds that nobody minds."""
SPARSE_CALLS = 3
"""Besides the timed ones: for parity, to warm up, for memory."""


def warning(
    cases: Iterable[tuple[Shape, float, bool]],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> str | None:
    """A sentence if the rows will take a CPU long; None on a GPU.

    Args:
        cases: the layer, its topk and whether the backward runs too, for every row.
        repeats: timed calls of each.
        device: where they run.
        dtype: of the inputs.
        backend: of the sparse calls.
    """
    if device.type != "cpu":
        return None
    if backend == "emulated":
        return (
            "The emulator takes the steps of a GPU one by one: its rows take minutes to hours and "
            "say nothing about speed."
        )
    rate = _rate(device, dtype)
    total = 0.0
    for layer, topk, backward in cases:
        cost = vsa.flops(layer.grid, layer.heads, layer.head_dim, topk, backward=backward)
        total += (cost.full * (1 + repeats) + cost.fine * (SPARSE_CALLS + repeats)) / rate
    if total < LONG:
        return None
    return (
        f"This will take some {_words(total)} on this CPU, by its speed at {PROBE_TOKENS:,} "
        "tokens. Rows appear as they come; --forward-only, fewer --repeats, fewer --heads or a "
        "smaller --grid take less."
    )


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of dense attention here."""
    heads, head_dim = 4, 64
    q, k, v = torch.randn(3, 1, heads, PROBE_TOKENS, head_dim, device=device).to(dtype).unbind()
    for _ in range(2):  # the first starts the threads
        begin = perf_counter()
        functional.scaled_dot_product_attention(q, k, v)
        seconds = perf_counter() - begin
    return 4 * heads * head_dim * PROBE_TOKENS**2 / seconds


def _words(seconds: float) -> str:
    if seconds < 2 * 3600:
        return f"{max(2, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.0f} hours"
