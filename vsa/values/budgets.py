# SPDX-License-Identifier: Apache-2.0
"""Budgets of a whole model: a number of tiles for every head of every layer, and their file."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vsa.values import checks
from vsa.values.budget import LayerBudget
from vsa.values.grid import SLOTS, Extent, Grid

FORMAT = "vsa budgets"
"""What the JSON of budgets says of itself."""
MEASURED = ("recall", "recall_uniform", "error", "error_uniform")
"""What may be known of every head."""
COMPILED = "_orig_mod."
"""What torch.compile puts before the names inside of a compiled module."""

Recalls = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Budgets:
    """Key tiles per query tile for every head of every layer, as ``vsa.calibrate`` finds them.

    ``apply_vsa`` takes it as ``topk``; ``apply_to`` gives it to ``vsa.nn.VideoSparseAttention``.
    ``print`` shows a table.

    Attributes:
        layers: the budget of each layer by the layer's name, in their order.
        uniform: tiles of every head at the same total, rounded down; what it is compared with.
        recall: what each head of a layer was found to keep of dense attention, if it was measured.
        recall_uniform: the same at ``uniform`` tiles for every head.
        grid: (T, H, W) that it was measured on, if it was.
        tile: tokens per tile there.
        score: how tiles were scored there.
        error: squared error of each head's output over the square of its layer's whole output; the
            sum over heads is the layer's squared relative error. None if it was not measured.
        error_uniform: the same at ``uniform`` tiles for every head.
        aim: what they were calibrated for, if they were.

    Raises:
        ValueError, TypeError: layers that are no budgets, or of several grids; a grid that has
            another number of tiles; recall or errors of other layers or heads.
    """

    layers: Mapping[str, LayerBudget]
    recall: Recalls | None = None
    recall_uniform: Recalls | None = None
    grid: Extent | None = None
    tile: Extent | None = None
    score: str = "mean"
    error: Recalls | None = None
    error_uniform: Recalls | None = None
    aim: str | None = None
    num_tiles: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(
                f"layers must map names to vsa.LayerBudget, but it is {self.layers!r:.60} of type "
                f"{type(self.layers).__name__}"
            )
        if not self.layers:
            raise ValueError("layers must name at least one layer, but there is none")
        for name, budget in self.layers.items():
            if not isinstance(name, str):
                raise TypeError(f"layers must have names, but one is {name!r:.60}")
            if not isinstance(budget, LayerBudget):
                raise TypeError(
                    f"layers[{name!r}] must be a vsa.LayerBudget, but it is {budget!r:.60}"
                )
        sizes = {budget.num_tiles for budget in self.layers.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"layers must share a grid, but they are for {min(sizes)} and {max(sizes)} tiles"
            )
        object.__setattr__(self, "layers", dict(self.layers))
        object.__setattr__(self, "num_tiles", sizes.pop())
        self._check_origin()
        for title in MEASURED:
            self._check_measured(title)

    def _check_origin(self) -> None:
        """What is said of where they were measured."""
        for title, word in (("score", self.score), ("aim", self.aim or "")):
            if not isinstance(word, str):
                raise TypeError(f"{title} must be a word, but it is {word!r:.60}")
        grid = None if self.grid is None else checks.extent("grid", self.grid)
        tile = None if self.tile is None else checks.tile("tile", self.tile, SLOTS)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "tile", tile)
        if grid is None or tile is None:
            return
        if (found := Grid(grid, tile).num_tiles) != self.num_tiles:
            raise ValueError(
                f"layers must be for the {found} tiles of the grid {grid} in tiles of {tile}, but "
                f"they are for {self.num_tiles}"
            )

    def _check_measured(self, title: str) -> None:
        """A share for each head of each layer, or nothing at all."""
        measured = getattr(self, title)
        if measured is None:
            return
        if not isinstance(measured, Mapping) or measured.keys() != self.layers.keys():
            raise ValueError(
                f"{title} must be for all layers and no others, but it is {measured!r:.60}"
            )
        for name, budget in self.layers.items():
            shares, heads = measured[name], len(budget.counts)
            if not isinstance(shares, (tuple, list)) or len(shares) != heads:
                raise ValueError(
                    f"{title}[{name!r}] must have one share per query head, but it is "
                    f"{shares!r:.60} for {heads} heads"
                )
            if not all(isinstance(share, numbers.Real) for share in shares):
                raise TypeError(f"{title}[{name!r}] must be numbers, but it is {shares!r:.60}")

    @property
    def heads(self) -> int:
        """Heads of all layers together."""
        return sum(len(budget.counts) for budget in self.layers.values())

    @property
    def total(self) -> int:
        """Key tiles of all heads together, for one query tile: the cost that is kept equal."""
        return sum(sum(budget.counts) for budget in self.layers.values())

    @property
    def uniform(self) -> int:
        """Tiles for each head where every head has as many, rounded down."""
        return self.total // self.heads

    @property
    def density(self) -> float:
        """Share of the key tiles that is kept on average."""
        return self.total / (self.heads * self.num_tiles)

    def of(self, layer: str) -> LayerBudget:
        """The budget of a layer.

        Raises:
            ValueError: a name that is not among them.
        """
        found = self.layers.get(layer)
        if found is None:
            raise ValueError(
                f"budgets must name the layer {layer!r}, but they name {_listed(list(self.layers))}"
            )
        return found

    def check(self, layers: Mapping[str, int], optional: Sequence[str] = ()) -> None:
        """Whether they fit a model.

        Args:
            layers: query heads of its layers by name.
            optional: layers that need no budget.

        Raises:
            ValueError: budgets for other layers or other numbers of heads.
        """
        if unknown := [name for name in self.layers if name not in layers]:
            raise ValueError(
                f"budgets must be for the layers of this model, {_listed(list(layers))}, but one "
                f"is for {unknown[0]!r}"
            )
        for name, heads in layers.items():
            if name in optional and name not in self.layers:
                continue
            if (own := len(self.of(name).counts)) != heads:
                raise ValueError(
                    f"budgets must have one number per query head, but they have {own} for the "
                    f"{heads} heads of {name!r}"
                )

    def check_grid(self, grid: Grid) -> None:
        """Whether they were found on this video and these tiles, or have as many where unknown.

        Raises:
            ValueError: another video, other tiles, or another number of them.
        """
        video = Grid(grid.shape, grid.tile)
        if self.grid is not None and self.tile is not None and Grid(self.grid, self.tile) != video:
            raise ValueError(
                f"topk was calibrated on {self.grid} tokens in tiles of {self.tile}, but this "
                f"video is {grid.shape} in tiles of {grid.tile}: calibrate for each video size"
            )
        if self.num_tiles != grid.num_tiles:
            raise ValueError(
                f"topk was found for a grid of {self.num_tiles} key tiles, but this one has "
                f"{grid.num_tiles}: calibrate on this grid, or pass shares of the tiles"
            )

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Set ``topk`` of every ``vsa.nn.VideoSparseAttention`` in a model.

        Args:
            model: one that has layers of these names and heads.

        Returns:
            The model.

        Raises:
            ValueError: other layers or heads; the model is unchanged then.
        """
        found = attention_layers(model)
        self.check({name: layer.heads for name, layer in found.items()})
        for name, layer in found.items():
            layer.topk = self.layers[name]
        return model

    def as_json(self) -> dict[str, Any]:
        """What ``save`` writes."""
        layers = [
            {
                "name": name,
                "tiles": list(budget.counts),
                **{
                    key: list(values[name])
                    for key in MEASURED
                    if (values := getattr(self, key)) is not None
                },
            }
            for name, budget in self.layers.items()
        ]
        return {
            "format": FORMAT,
            "num_tiles": self.num_tiles,
            "grid": self.grid and list(self.grid),
            "tile": self.tile and list(self.tile),
            "score": self.score,
            "aim": self.aim,
            "total": self.total,
            "uniform": self.uniform,
            "layers": layers,
        }

    @classmethod
    def from_json(cls, content: Any, source: str = "the file") -> Budgets:
        """The inverse of ``as_json``.

        Raises:
            ValueError: something else, or a total that is not that of the layers.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            each = content["layers"]
            names, size = [layer["name"] for layer in each], content["num_tiles"]
            recalls = {
                key: dict(zip(names, (tuple(layer[key]) for layer in each), strict=True))
                for key in MEASURED
                if all(key in layer for layer in each)
            }
            grid, tile = (content[key] and tuple(content[key]) for key in ("grid", "tile"))
            budgets = (LayerBudget(tuple(layer["tiles"]), size) for layer in each)
            layers = dict(zip(names, budgets, strict=True))
            aim = content.get("aim")  # which the first files do not have
            score = content["score"]
            found = cls(layers, **recalls, aim=aim, grid=grid, tile=tile, score=score)
            if len(layers) != len(each) or found.total != content["total"]:
                raise ValueError("its total is not that of its layers")
        except (KeyError, TypeError, ValueError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{source} must hold budgets of vsa.calibrate, but {said}") from None
        return found

    def save(self, path: Path | str) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.as_json(), indent=1))

    @classmethod
    def load(cls, path: Path | str) -> Budgets:
        """Read what ``save`` wrote.

        Raises:
            ValueError: another file, or none.
        """
        return cls.from_json(read_json(path), str(path))

    def __str__(self) -> str:
        where = "" if self.grid is None else f", grid {'x'.join(map(str, self.grid))}"
        lines = [
            f"{self.total:,} tiles for {self.heads} heads of {len(self.layers)} layers: "
            f"{self.density:.1%} of {self.num_tiles}{where}, score {self.score}"
            + (f", aim {self.aim}" if self.aim else "")
        ]
        rows: list[tuple[str, ...]] = [
            ("layer", "tiles, least to most", "worst recall", "if uniform")
        ]
        if self.error is not None:
            rows[0] += ("output error", "if uniform")
        for name, budget in self.layers.items():
            rows.append((name, _range(budget.counts), *self._worst([name]), *self._error([name])))
        each = [count for budget in self.layers.values() for count in budget.counts]
        everything = list(self.layers)
        rows.append(("all", _range(each), *self._worst(everything), *self._error(everything)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<vsa.Budgets of {str(self).splitlines()[0]}>"

    def _worst(self, names: Sequence[str]) -> list[str]:
        """Least recall among some layers, calibrated and uniform."""
        return [
            "" if values is None else f"{min(x for name in names for x in values[name]):.1%}"
            for values in (self.recall, self.recall_uniform)
        ]

    def _error(self, names: Sequence[str]) -> list[str]:
        """Relative error of some layers' outputs, the root of the mean square; none if unknown."""
        return [
            f"{(sum(x for name in names for x in values[name]) / len(names)) ** 0.5:.3f}"
            for values in (self.error, self.error_uniform)
            if values is not None
        ]


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that take a ``topk`` for their ``heads``, by name.

    Names are those that an uncompiled model has.

    Raises:
        TypeError: no model.
        ValueError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, but it is {model!r:.60}")
    found = {
        f"{name}.".replace(COMPILED, "").removesuffix("."): module
        for name, module in model.named_modules()
        if hasattr(type(module), "topk") and hasattr(module, "heads")
    }
    if not found:
        raise ValueError(
            f"model must hold a vsa.nn.VideoSparseAttention, but {type(model).__name__} has none"
        )
    return found


def read_json(path: Path | str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: a file that cannot be read.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, but it cannot be read: {error}") from None


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    """A few names and how many more there are."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
