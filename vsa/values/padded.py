# SPDX-License-Identifier: Apache-2.0
"""Padded tiles: 64 slots each, one after the other, the first ``size`` of them real tokens.

The form in which FastVideo and its like hold a video. It is a grid of whole tiles in which every
tile has a number of real tokens of its own, 0 to 64, that no arithmetic gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.values.grid import SLOTS, Grid


def grid_of(tiles: int) -> Grid:
    """Where the tiles lie: every slot is a token of this grid."""
    return Grid((tiles, 1, SLOTS), (1, 1, SLOTS))


def real_slots(sizes: Tensor) -> Tensor:
    """Which slots hold real tokens: sizes (n,) -> (n, 64) bool."""
    return torch.arange(SLOTS, device=sizes.device) < sizes[:, None]


def sizes_of_parts(sizes: Tensor, parts: int) -> Tensor:
    """Tiles of ``parts`` times 64 slots as that many tiles each: (n,) -> (n * parts,)."""
    if parts == 1:
        return sizes
    first = torch.arange(parts, dtype=sizes.dtype, device=sizes.device) * SLOTS
    return (sizes[:, None] - first).clamp(0, SLOTS).flatten()
