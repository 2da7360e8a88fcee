# SPDX-License-Identifier: Apache-2.0
"""In how many passes the backward of the fine stage works on a head: the one place that decides.

Two passes, over key tiles and over query tiles, make seven products for a pair of tiles. One pass
makes five, and adds up dQ in global memory in fp32, in any order. It is worth it where neighbouring
key tiles were chosen by the same queries, which ``_C.PassChoice`` finds out on the device for each
key head. Two passes are taken for all heads

- at a head_dim of 128, where registers do not suffice for one,
- with text or padded tiles, which are worked on in an order of their own,
- under ``torch.use_deterministic_algorithms(True)``, since sums in any order differ in their bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsa.backends.kernels.calls import Located, passes_call
from vsa.backends.kernels.machine import Machine
from vsa.values.grid import SLOTS, Grid

if TYPE_CHECKING:
    from vsa import _C

LEAST_SHARED = 0.25
"""Of the queries that selected either of two neighbouring key tiles, the share that selected both
from which on a key head is worked on in one pass."""


def may_take_one(head_dim: int, grids: tuple[Grid, Grid], padded: bool) -> bool:
    """Whether there is a kernel for one pass."""
    text = any(grid.prefix or grid.suffix for grid in grids)
    return head_dim == 64 and not text and not padded


def must_repeat() -> bool:
    """Whether gradients have to be the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()


def choice_of(transposed: Located, axes: Located, passes: Located, grid: Grid) -> _C.PassChoice:
    """Which key heads are worked on in one pass.

    Args:
        transposed: (B, heads, n_k, words) int32, contiguous.
        axes: (B, kv_heads) int32, along which key tiles are neighbours.
        passes: (B, kv_heads) int32, written.
        grid: of the keys.
    """
    return passes_call(transposed, axes, passes, grid.tiles[0], LEAST_SHARED)


def sums_shape(batch: int, heads: int, grid: Grid) -> tuple[int, ...]:
    """Of the fp32 tensor in which one pass adds up dQ; grid: of the queries."""
    return batch, heads, grid.num_tiles, SLOTS, 64


def choose(
    machine: Machine,
    transposed: Tensor,
    axes: Tensor,
    head_dim: int,
    grids: tuple[Grid, Grid],
    padded: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The passes of each key head, and memory for the sums of one pass; None for two for all.

    Args:
        machine: what runs the kernel.
        transposed: (B, heads, n_k, words) int32, contiguous.
        axes: (B, kv_heads) int32, along which key tiles are neighbours.
        head_dim: channels of a head.
        grids: of the queries and of the keys.
        padded: whether tiles have sizes of their own.
    """
    if must_repeat() or not may_take_one(head_dim, grids, padded):
        return None, None
    passes = torch.empty_like(axes)
    machine.run(choice_of(transposed, axes, passes, grids[1]), axes.device)
    shape = sums_shape(*transposed.shape[:2], grids[0])
    return passes, torch.empty(shape, dtype=torch.float32, device=axes.device)
