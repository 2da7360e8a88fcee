# SPDX-License-Identifier: Apache-2.0
"""In how many passes the backward of the fine stage works: the one place that decides.

Two passes, over key tiles and over query tiles, make seven products for a pair of tiles. One pass
makes five, and adds up dQ in global memory in fp32, in any order. It is the faster one wherever it
can be taken (bench/log/one-pass.md). Two passes are taken

- at head_dims that are not in ``HEAD_DIMS``: at 128 one pass is built, and not yet measured,
- with text or padded tiles, which are worked on in an order of their own,
- under ``torch.use_deterministic_algorithms(True)``, since sums in any order differ in their bits.
"""

from __future__ import annotations

import torch

from vsa.values.grid import SLOTS, Grid

HEAD_DIMS: tuple[int, ...] = (64,)
"""Channels of a head at which one pass is taken."""


def may_take_one(head_dim: int, grids: tuple[Grid, Grid], padded: bool) -> bool:
    """Whether one pass is taken, unless bits have to repeat."""
    text = any(grid.prefix or grid.suffix for grid in grids)
    return head_dim in HEAD_DIMS and not text and not padded


def must_repeat() -> bool:
    """Whether gradients have to be the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()


def sums_shape(batch: int, heads: int, grid: Grid, head_dim: int) -> tuple[int, ...]:
    """Of the fp32 tensor in which one pass adds up dQ; grid: of the queries."""
    return batch, heads, grid.num_tiles, SLOTS, head_dim
