# SPDX-License-Identifier: Apache-2.0
"""Warnings about what is allowed and yet may not be meant, each once in a process.

Callers leave them out where torch.compile traces, which would follow every step of these.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from vsa.values.grid import SLOTS, Extent, Grid, best_tile

MANY_TILES = 64
"""Of so many, who writes ``topk=1`` may have meant the share 1.0."""
MOST_GRIDS = 64
"""Grids that are looked at for thin tiles."""
_said: set[str] = set()
_thin: set[Extent] = set()


def about_budget(topk: object, num_tiles: int) -> None:
    """Whole numbers that keep everything, and a 1 that keeps one tile of many.

    Args:
        topk: a checked budget.
        num_tiles: key tiles; nothing is said about a single one.
    """
    if num_tiles == 1:
        return
    given = topk if isinstance(topk, Sequence) else (topk,)
    whole = [each for each in given if isinstance(each, int)]
    if largest := [each for each in whole if each > num_tiles]:
        _once(
            "dense",
            f"topk is {max(largest)}, but there are {num_tiles} key tiles: all of them are kept, "
            "which is dense attention (topk=1.0 says the same without this warning)",
        )
    if 1 in whole and num_tiles >= MANY_TILES:
        _once(
            "one",
            f"topk is the whole number 1, which keeps one key tile of {num_tiles}: a share is "
            f"written with a point, and 1.0 keeps all of them (topk={1 / num_tiles:.2g} keeps one "
            "without this warning)",
        )


def about_runs(q: Tensor, grid: object, tile: object) -> None:
    """A flat sequence whose tiles nobody has chosen.

    Args:
        q: as the user gave it.
        grid: likewise, or that of the selection.
        tile: likewise; (1, 1, 64) says that runs are meant.
    """
    if grid is not None or q.ndim != 4 or tile == (1, 1, SLOTS):
        return
    if q.shape[1] > SLOTS:
        _once(
            "runs",
            f"q is flat with {q.shape[1]} tokens and no grid was given: its tiles are runs along "
            "the sequence, not boxes of a video; pass grid=(T, H, W), or tile=(1, 1, 64) if runs "
            "are meant",
        )


def about_transforms(name: str, q: Tensor | None) -> None:
    """A GPU that gets PyTorch's operators, since kernels have no forward-mode derivative."""
    if q is not None and q.is_cuda:
        _once(
            "transforms",
            f"{name} has a forward-mode tangent or is inside of a transform of torch.func, which "
            "vsa follows with PyTorch's operators: slower than kernels, and with more memory",
        )


def about_thin_tiles(grid: Grid, by_default: bool) -> None:
    """Tiles that a short axis cuts down, which cost as much as whole ones.

    Args:
        grid: of queries or keys.
        by_default: whether nobody has chosen a tile.
    """
    tokens = math.prod(grid.box)
    if not by_default or 2 * tokens >= SLOTS:
        return
    if grid.shape in _thin or len(_thin) >= MOST_GRIDS:
        return
    _thin.add(grid.shape)
    better = best_tile(grid.shape)
    if 2 * Grid(grid.shape, better).num_tiles <= grid.num_tiles:
        warnings.warn(
            f"tile {grid.tile} holds {tokens} of {SLOTS} tokens on the grid {grid.shape}, which "
            f'makes attention many times slower: pass tile="auto", which takes {better}',
            stacklevel=5,
        )


def _once(kind: str, sentence: str) -> None:
    if kind not in _said:
        _said.add(kind)
        warnings.warn(sentence, stacklevel=5)  # who called vsa.attention
