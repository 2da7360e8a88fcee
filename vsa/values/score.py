# SPDX-License-Identifier: Apache-2.0
"""What tiles are chosen by: the score of tile means, or of the means of their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vsa.values import checks

MOST_SUB_BLOCKS = 16
"""Of a tile: the products that a score takes grow with the square."""


@dataclass(frozen=True)
class SubBlocks:
    """Choose tiles by the means of their parts, which finds what one mean per tile averages away.

    The tokens of a tile, in the tile's own order (t, then h, then w), are cut into ``n`` runs, as
    even as can be: the first ones are a token longer where n does not divide. With the means
    qc_ia and kc_jb of the runs of query tile i and key tile j,

        score(i, j) = log sum_ab exp(scale * qc_ia . kc_jb)

    so a key tile is chosen if any part of it matters to any part of the query tile. Runs weigh the
    same, whatever their length. A tile of fewer than ``n`` tokens has a run for each, and no
    others. One run is the whole tile: ``SubBlocks(1)`` chooses as ``"mean"`` does.

    Args:
        n: runs of a tile, from 1 to 16. The products that scores take grow as n * n.

    Raises:
        ValueError, TypeError: naming ``n``.
    """

    n: int

    def __post_init__(self) -> None:
        n = checks.integer("n", self.n, at_least=1)
        if n > MOST_SUB_BLOCKS:
            raise ValueError(f"n must be from 1 to {MOST_SUB_BLOCKS} runs of a tile, but it is {n}")
        object.__setattr__(self, "n", n)


Score = Literal["mean"] | SubBlocks
"""What ``score`` may be."""


def runs_of(score: object) -> int:
    """Runs of a tile whose means are scored, 1 for the mean of the whole.

    Raises:
        ValueError, TypeError: in one sentence that names ``score``.
    """
    if isinstance(score, SubBlocks):
        return score.n
    if isinstance(score, str):
        if score != "mean":
            raise ValueError(f'score must be "mean" or a vsa.SubBlocks, but it is {score!r}')
        return 1
    raise TypeError(
        f'score must be "mean" or a vsa.SubBlocks, but it is of type {type(score).__name__}'
    )
