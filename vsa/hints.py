# SPDX-License-Identifier: Apache-2.0
"""Warnings about what is allowed and yet may not be meant, each once in a process.

None comes from code that torch.compile traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.grid import SLOTS, Extent, Grid

MANY_TILES = 64
"""Of so many, who writes ``topk=1`` may have meant the share 1.0."""
_said: set[str] = set()


def about_budget(topk: object, num_tiles: int) -> None:
    """Whole numbers that keep everything, and a 1 that keeps one tile of many.

    Args:
        topk: a checked budget.
        num_tiles: key tiles; nothing is said about a single one.
    """
    if torch.compiler.is_compiling() or num_tiles == 1:
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


def about_runs(q: Tensor, grid: Extent | Grid | None, tile: object) -> None:
    """A flat sequence whose tiles nobody has chosen.

    Args:
        q: as the user gave it.
        grid: likewise, or that of the selection.
        tile: likewise; (1, 1, 64) says that runs are meant.
    """
    if torch.compiler.is_compiling() or grid is not None or q.ndim != 4 or tile == (1, 1, SLOTS):
        return
    if q.shape[1] > SLOTS:
        _once(
            "runs",
            f"q is flat with {q.shape[1]} tokens and no grid was given: its tiles are runs along "
            "the sequence, not boxes of a video; pass grid=(T, H, W), or tile=(1, 1, 64) if runs "
            "are meant",
        )


def _once(kind: str, sentence: str) -> None:
    if kind not in _said:
        _said.add(kind)
        warnings.warn(sentence, stacklevel=5)  # who called vsa.attention
