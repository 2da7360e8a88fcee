# SPDX-License-Identifier: Apache-2.0
"""In how many passes the backward of the fine stage works: the one place that decides.

Two passes, over key tiles and over query tiles, make seven products for a pair of tiles. One pass
makes five, and adds up dQ in global memory in fp32, in any order. It is the faster one wherever it
can be taken (bench/log/one-pass.md). Two passes are taken

- at a head_dim of 128, where registers do not suffice for a reducer and one pass without is slower,
- with text or padded tiles, which are worked on in an order of their own,
- under ``torch.use_deterministic_algorithms(True)``, since sums in any order differ in their bits.
"""

from __future__ import annotations

import torch

from vsa.values.grid import SLOTS, Grid

HEAD_DIM = 64
"""Channels of a head that one pass is made for."""


def may_take_one(head_dim: int, grids: tuple[Grid, Grid], padded: bool) -> bool:
    """Whether there is a kernel for one pass."""
    text = any(grid.prefix or grid.suffix for grid in grids)
    return head_dim == HEAD_DIM and not text and not padded


def must_repeat() -> bool:
    """Whether gradients have to be the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()


def sums_shape(batch: int, heads: int, grid: Grid) -> tuple[int, ...]:
    """Of the fp32 tensor in which one pass adds up dQ; grid: of the queries."""
    return batch, heads, grid.num_tiles, SLOTS, HEAD_DIM
