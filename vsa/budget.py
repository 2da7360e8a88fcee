# SPDX-License-Identifier: Apache-2.0
"""How many key tiles a query tile keeps: a number, a share, one of these per head, or a mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vsa import checks, hints


@dataclass(frozen=True)
class TopP:
    """Keep tiles, best first, until they hold a share of the softmax over all key tiles.

    The softmax is that of the coarse stage, over the scaled scores of tile means. Each query tile
    gets the fewest tiles whose shares add up to ``mass``, and never fewer than ``floor``: many
    where attention is spread, few where it is sharp. Tiles forced by ``must`` come first and count.

    Shares are whole multiples of 2**-31 of the largest one, so that their sums are exact and the
    same on every machine; they are right to about 1e-6. A share under 2**-32 of the largest (a
    score 22.2 below it) counts as nothing: ``mass=1.0`` keeps all tiles but those.

    Args:
        mass: share of the softmax to reach, in (0, 1].
        floor: least tiles per query tile, an int or a share of the key tiles, as ``topk``.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    mass: float
    floor: float = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", checks.share("mass", self.mass))
        checks.top_k(self.floor, num_tiles=1, name="floor")


TopK = float | TopP | Sequence[float]
"""What ``topk`` may be: an int, a float in (0, 1], a ``TopP``, or an int or float per head."""


@dataclass(frozen=True)
class Budget:
    """What one row of scores keeps: at least ``counts`` tiles, and at least ``mass``.

    Attributes:
        counts: least tiles of a row, from 1 to n_k; one number for all query heads, or one each.
        mass: least share of a row's softmax, 0 for none.
    """

    counts: tuple[int, ...]
    mass: float = 0.0

    @property
    def most(self) -> int | None:
        """The most tiles that a row keeps, None if only the scores can tell."""
        return None if self.mass else max(self.counts)

    def is_everything(self, num_tiles: int) -> bool:
        """Whether all tiles are kept whatever the scores."""
        return min(self.counts) >= num_tiles


def resolve(topk: object, num_tiles: int, heads: int) -> Budget:
    """The budget that ``topk`` means for ``num_tiles`` key tiles.

    Raises:
        ValueError, TypeError: in one sentence that names ``topk``.
    """
    budget = _resolved(topk, num_tiles, heads)
    hints.about_budget(topk, num_tiles)
    return budget


def _resolved(topk: object, num_tiles: int, heads: int) -> Budget:
    if isinstance(topk, TopP):
        return Budget((checks.top_k(topk.floor, num_tiles),), topk.mass)
    if isinstance(topk, (tuple, list)):
        checks.one_per_head("topk", topk, heads)
        return Budget(
            tuple(
                checks.top_k(each, num_tiles, name=f"topk[{head}]")
                for head, each in enumerate(topk)
            )
        )
    return Budget((checks.top_k(topk, num_tiles),))
