# SPDX-License-Identifier: Apache-2.0
"""The forward of the fine stage by the project's own kernels, gates and coarse output included."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends.kernels.calls import (
    Located3,
    LocatedGates,
    Shared,
    axis_call,
    forward_call,
)
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import addressable, one_per_tile
from vsa.backends.kernels.text import Make, text_of
from vsa.values.grid import Extent
from vsa.values.problem import FineProblem, Gates


def forward(
    machine: Machine, problem: FineProblem, gates: Gates, fine: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Results as in ``vsa.backends.base.Backend.forward``.

    With gates the output is the combined one, rounded once. The fine stage's part of it is written
    to ``fine``, like q and contiguous, where a backward wants it.
    """
    grids = problem.grids
    sign, scale = positive_scale(problem.scale)
    q = addressable(problem.q * sign if sign != 1 else problem.q)
    k, v = addressable(problem.k), addressable(problem.v)
    out = contiguous_like(q)
    of_rows = q.shape[0], q.shape[2], q.shape[1]
    lse = torch.empty(of_rows, dtype=torch.float32, device=q.device)
    sizes = whole_numbers(problem)
    if sizes[0] is not None:
        lse.fill_(float("-inf"))
    bitmap, text_valid = problem.bitmap.contiguous(), problem.text_valid
    # Scores of invalid keys are masked, whatever they are.
    text = text_of(text_valid, q.shape[0], q.shape[3], grids, [(v, grids[1])], new_on(q.device))
    for call in text.calls:
        machine.run(call, q.device)
    tile_counter = torch.empty(1, dtype=torch.int32, device=q.device)
    axes = neighbour_axes(machine, bitmap, grids[0].tiles, q.shape[2], tile_counter)
    fine_call = forward_call(
        Located3(q, q),
        Located3(k, k),
        text.clean[0],
        Shared(grids, scale, bitmap, axes, text.query_rows, text.key_rows, sizes),
        LocatedGates(*gates),
        out,
        fine,
        lse,
        tile_counter,
    )
    machine.run(fine_call, q.device)
    return out, lse


def contiguous_like(x: Tensor) -> Tensor:
    """A contiguous tensor like x, not written yet."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def whole_numbers(problem: FineProblem) -> tuple[Tensor | None, Tensor | None]:
    """Sizes of padded tiles as kernels read them."""
    sizes, kv_sizes = problem.tile_sizes
    if sizes is None or kv_sizes is None:
        return None, None
    return one_per_tile("sizes", sizes), one_per_tile("kv_sizes", kv_sizes)


def neighbour_axes(
    machine: Machine,
    bitmap: Tensor,
    tiles: Extent,
    groups: int,
    counters: Tensor | None = None,
) -> Tensor:
    """Along which axis the tiles that a block works on together are neighbours.

    Consumers of a block share what more than one of them wants and wait for the longest, so each
    head takes the axis along which neighbours have more in common and differ less in length, judged
    by a sample of its tiles. Where rows grow, the longest are taken first.

    Args:
        machine: what runs the kernel.
        bitmap: (B, heads, num_tiles, words) int32, a row for every tile; contiguous.
        tiles: how many there are along t, h and w.
        groups: of heads, each of which decides as one: heads that follow each other.
        counters: (n,) int32 that are cleared for the kernels that come next.

    Returns:
        (B, groups) int32, ``_C.ALONG_W`` or ``_C.ALONG_T``, with ``_C.BACKWARDS`` where the last
        tiles are taken first.
    """
    axes = bitmap.new_empty(bitmap.shape[0], groups)
    machine.run(axis_call(bitmap, axes, tiles, counters), bitmap.device)
    return axes


def positive_scale(scale: float) -> tuple[int, float]:
    """A factor for q and a positive scale: the kernels look for the largest score."""
    if scale > 0:
        return 1, scale
    return (0 if scale == 0 else -1), -scale or 1.0


def new_on(device: torch.device) -> Make:
    """What makes tensors there."""
    return lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=device)
