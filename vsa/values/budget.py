# SPDX-License-Identifier: Apache-2.0
"""How many key tiles a query tile keeps: a number, a share, one of these per head, or a mass."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vsa.values import checks, hints


@dataclass(frozen=True)
class TopP:
    """Keep tiles, best first, until they hold a share of the softmax over all key tiles.

    The softmax is that of the coarse stage, over the scaled scores of tile means, or that of the
    scores of a ``vsa.SubBlocks`` where tiles are chosen by those. Each query tile
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
        object.__setattr__(self, "floor", checks.plain_number(self.floor))


@dataclass(frozen=True)
class LayerBudget:
    """A number of tiles for each query head of a layer, found for one number of key tiles.

    Where a tuple of numbers is clamped to the tiles of any grid, this is refused on another one:
    what was found for a grid says nothing about the next. Compiled code takes it as data, so that
    layers with budgets of their own share their code; a tuple is a constant of it.

    Args:
        counts: key tiles per query tile, one number for each query head, from 1 to ``num_tiles``.
        num_tiles: key tiles of the grid that they were found for.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    counts: tuple[int, ...]
    num_tiles: int
    _numbers: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        most = checks.integer("num_tiles", self.num_tiles, at_least=1)
        checks.not_empty("counts", self.counts)
        for head, count in enumerate(self.counts):
            if checks.integer(f"counts[{head}]", count, at_least=1) > most:
                raise ValueError(
                    f"counts[{head}] must be at most num_tiles, but it is {count} of {most} tiles"
                )
        object.__setattr__(self, "counts", tuple(map(int, self.counts)))
        object.__setattr__(self, "num_tiles", most)
        shares = [_share_of(count, most) for count in self.counts]
        with torch.inference_mode(False):  # autograd may have to keep them
            numbers = torch.tensor([0.0, *shares], dtype=torch.float64, device="cpu")
        object.__setattr__(self, "_numbers", numbers)

    def resolve(self, num_tiles: int, heads: int) -> Budget:
        """What it means for a call, whose grid and heads it must fit."""
        if self.num_tiles != num_tiles:
            raise ValueError(
                f"topk was found for a grid of {self.num_tiles} key tiles, but this one has "
                f"{num_tiles}: calibrate on this grid, or pass shares of the tiles"
            )
        if torch.compiler.is_compiling():
            checks.one_per_head("topk", range(len(self._numbers) - 1), heads)
            return Budget((1,), numbers=self._numbers, shares=(0.0,) * heads)
        checks.one_per_head("topk", self.counts, heads)
        return Budget(self.counts, 0.0, min(self.counts) >= num_tiles, shares=(0.0,) * heads)

    def of_heads(self, heads: slice) -> LayerBudget:
        """That of some of the heads."""
        return LayerBudget(self.counts[heads], self.num_tiles)

    def __str__(self) -> str:
        low, high = min(self.counts), max(self.counts)
        each = low if low == high else f"{low} to {high}"
        return f"{each} of {self.num_tiles} tiles by head"


TopK = float | TopP | LayerBudget | Sequence[float] | Tensor
"""What ``topk`` may be: an int, a float in (0, 1], a ``TopP``, a ``LayerBudget``, an int or float
per head, or a tensor () on the CPU that holds an int or float."""


@dataclass(frozen=True)
class Budget:
    """What one row of scores keeps: at least ``counts`` tiles, and at least ``mass``.

    Attributes:
        counts: least tiles of a row, from 1 to n_k; one number for all query heads, or one each.
        mass: least share of a row's softmax, 0 for none.
        is_everything: whether all tiles are kept whatever the scores.
        numbers: what stands for all of these in compiled code that was made for numbers that vary,
            (1 + one or heads,) fp64 on the CPU: the mass, then shares of the tiles.
        shares: for each of ``counts``, of what a row may choose under a mask: the share that was
            given, 0 where a number was. With ``numbers`` any share there says that it is one.
    """

    counts: tuple[int, ...]
    mass: float = 0.0
    is_everything: bool = False
    numbers: Tensor | None = None
    shares: tuple[float, ...] = (0.0,)

    @property
    def most(self) -> int | None:
        """The most tiles that a row keeps, None if only the scores or ``numbers`` can tell."""
        return None if self.mass or self.numbers is not None else max(self.counts)


def resolve(topk: object, num_tiles: int, heads: int) -> Budget:
    """The budget that ``topk`` means for ``num_tiles`` key tiles.

    Raises:
        ValueError, TypeError: in one sentence that names ``topk``.
    """
    budget = _resolved(topk, num_tiles, heads)
    if not torch.compiler.is_compiling():
        hints.about_budget(topk, num_tiles)
    return budget


def check(topk: object, heads: int) -> None:
    """Refuse what ``resolve`` refuses on any grid.

    Raises:
        ValueError, TypeError: in one sentence that names ``topk``.
    """
    resolve(topk, topk.num_tiles if isinstance(topk, LayerBudget) else 1, heads)


def _resolved(topk: object, num_tiles: int, heads: int) -> Budget:
    if isinstance(topk, LayerBudget):
        return topk.resolve(num_tiles, heads)
    mass, values, names = 0.0, (topk,), ["topk"]
    data = varies(topk)
    if isinstance(topk, TopP):
        mass, values, names = topk.mass, (topk.floor,), ["floor"]
        data = varies(topk.mass) or varies(topk.floor)
    elif isinstance(topk, (tuple, list)):
        checks.one_per_head("topk", topk, heads)
        values, names = tuple(topk), [f"topk[{head}]" for head in range(heads)]
        data = any(map(varies, values))
    elif isinstance(topk, Tensor):
        checks.number_tensor("topk", topk)
        if not torch.compiler.is_compiling():
            values = (topk.item(),)
    if data:
        kinds = tuple(float(_is_share(value)) for value in values)
        return Budget((1,), numbers=_as_data(mass, values, num_tiles, names), shares=kinds)
    counts: list[int] = []
    shares: list[float] = []
    for value, name in zip(values, names, strict=True):
        counts.append(checks.top_k(value, num_tiles, name))
        shares.append(float(value) if _is_share(value) else 0.0)  # type: ignore[arg-type]
    everything = _known(num_tiles, counts) and min(counts) >= num_tiles
    return Budget(tuple(counts), mass, everything, shares=tuple(shares))


def _is_share(value: object) -> bool:
    """Whether a number of tiles is given as a share of them."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return not isinstance(value, (torch.SymInt, numbers.Integral))


def shares_of(shares: Sequence[float], given: Tensor | None) -> list[float]:
    """The shares that a ``Budget`` stands for under a mask, when it is spent; none without one."""
    if given is None or not len(shares):
        return list(shares)
    return [is_one and share for is_one, share in zip(shares, given[1:].tolist(), strict=True)]


def counts_and_mass(
    counts: Sequence[int], mass: float, numbers: Tensor | None, num_tiles: int
) -> tuple[list[int], float]:
    """The counts and the mass that a ``Budget`` stands for, when it is spent.

    Raises:
        ValueError: a share outside (0, 1] among ``numbers``.
    """
    if numbers is None:
        return list(counts), mass
    mass, *shares = numbers.tolist()
    return [checks.top_k(share, num_tiles) for share in shares], mass


def _known(num_tiles: int, counts: Sequence[int]) -> bool:
    """Whether these are numbers: comparing symbols would make a graph for each answer."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(map(has_static_value, (num_tiles, *counts)))


def varies(value: object) -> bool:
    """Whether compiled code is being made for a number that changes between calls, as data.

    Whole numbers may change without: they can be sizes. Fractions and what depends on them can be
    no sizes, and would be constants again, and another graph, for every value.
    """
    if not torch.compiler.is_compiling() or not isinstance(value, (float, Tensor)):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return isinstance(value, Tensor) or not has_static_value(value)


def _as_data(mass: float, values: Sequence[object], num_tiles: int, names: Sequence[str]) -> Tensor:
    """``Budget.numbers``: as products, since these are what torch.compile makes data of."""
    one = torch.ones((), dtype=torch.float64)
    shares: list[Tensor] = []
    for value, name in zip(values, names, strict=True):
        if isinstance(value, Tensor):
            share = value.double()
            whole = not value.is_floating_point()
        else:
            checks.top_k(value, 1, name)
            share, whole = one * value, not isinstance(value, float)  # type: ignore[operator]
        if whole:
            share = _share_of(share, num_tiles).clamp(max=1)  # more than there are: all of them
        shares.append(share)
    return torch.stack([one * mass, *shares])


def _share_of(count: Any, num_tiles: int) -> Any:
    """A share that is rounded up to this number: a half less than it is."""
    return (count - 0.5) / num_tiles
