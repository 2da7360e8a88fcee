# SPDX-License-Identifier: Apache-2.0
"""What a model's selections kept while it ran: recall, density and tile maps by layer and step.

Memory and cost are bounded, so that it can look at real runs: recall is measured for a few query
tiles, and what stays of a layer and step is two numbers per head, and for a few layers one number
per key tile. Nothing here waits for the device before the numbers are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vsa.diagnostics import metrics
from vsa.diagnostics.curves import SAMPLED_TILES, Curves
from vsa.diagnostics.precision import PrecisionErrors
from vsa.values import bitmap, checks
from vsa.values.grid import Grid
from vsa.values.selection import Selection


@dataclass(eq=False)
class Record:
    """Fill it with ``note``, or let ``vsa.integrations.diffusers.collect`` do so.

    Attributes:
        layers: layers of the model.
        every: steps between two that are noted.
        tiles: query tiles, spread over the video, that recall is measured for.
        maps: layers whose tile maps are kept.
        curves: recall and output error at every budget, for ``vsa.calibrate``; None where nobody
            asked for them.
        precision: what low precision changes, see ``vsa.diagnostics.PrecisionErrors``; likewise.
        grid: the video's tokens and tiles, known from the first note on.
    """

    layers: int
    every: int = 1
    tiles: int = SAMPLED_TILES
    maps: Sequence[int] = ()
    curves: Curves | None = None
    precision: PrecisionErrors | None = None
    grid: Grid | None = field(default=None, init=False)
    _steps: set[int] = field(default_factory=set, init=False)
    _numbers: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    _maps: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("layers", "every", "tiles"):
            checks.integer(name, getattr(self, name), at_least=1)
        for layer in self.maps:
            if not isinstance(layer, int) or not 0 <= layer < self.layers:
                raise ValueError(
                    f"maps must be numbers of layers from 0 to {self.layers - 1}, but one is "
                    f"{layer!r}"
                )

    def begin(self, step: int) -> bool:
        """Whether a step that begins is to be noted; if so it is among ``steps``, even if dense."""
        wanted = step % self.every == 0
        if wanted:
            self._steps.add(step)
        return wanted

    @torch.no_grad()
    def note(
        self,
        layer: int,
        step: int,
        q: Tensor,
        k: Tensor,
        selection: Selection,
        v: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> None:
        """Measure one layer in one step; a second note of both takes the place of the first.

        Args:
            layer: its number.
            step: its number.
            q: (B, S, heads, head_dim), after the rotary embedding.
            k: likewise, its heads dividing those of q.
            selection: what this layer attended in this step; it knows its grid.
            v: like k, for the output errors of ``curves``, which without it have recall alone, and
                for ``precision``, which needs it.
            text_valid: (B, prefix + suffix) bool, which text tokens are real; None for all.

        Raises:
            ValueError: a selection without a grid, or of another grid than before.
        """
        if selection.grid is None:
            raise ValueError(
                "selection must know its grid for tiles to be sampled: pass grid= to "
                "Selection.from_mask"
            )
        grid = replace(selection.grid, prefix=0, suffix=0)
        if self.grid not in (None, grid):
            raise ValueError(
                f"selection is for the grid {grid.shape} in tiles of {grid.tile}, but this record "
                f"is of {self.grid.shape} in tiles of {self.grid.tile}: make one for each video"
            )
        self.grid = grid
        density = metrics.density(selection).mean(0)
        recall = metrics.sampled_recall(selection, q, k, tiles=self.tiles).mean(0)
        self._steps.add(step)
        self._numbers[layer, step] = density, recall
        if self.curves is not None:
            name = self.curves.layers[layer]
            self.curves.note(name, q, k, v, grid=selection.grid, step=step, text_valid=text_valid)
        if self.precision is not None:
            if v is None:
                raise ValueError("v must be given where errors of low precision are noted")
            self.precision.note(
                self.precision.layers[layer], q, k, v, selection=selection, step=step
            )
        if layer in self.maps:
            kept = bitmap.unpack(selection.bitmap[0, :, self.query], selection.num_key_tiles)
            self._maps[layer, step] = kept.float().mean(0)

    @property
    def query(self) -> int:
        """The query tile whose map is kept: the one in the middle of the video."""
        nt, nh, nw = self._known_grid().tiles
        return (nt // 2 * nh + nh // 2) * nw + nw // 2

    @property
    def steps(self) -> list[int]:
        """The steps that were noted."""
        return sorted(self._steps)

    @property
    def density(self) -> Tensor:
        """(layers, steps, heads) fp32 on the CPU: share of the key tiles kept; NaN where dense."""
        return self._table(0)

    @property
    def recall(self) -> Tensor:
        """(layers, steps, heads): share of dense attention to the video that the tiles keep."""
        return self._table(1)

    def tile_map(self, layer: int, step: int) -> Tensor | None:
        """(nt, nh, nw) fp32 on the CPU: share of the heads in which ``query`` keeps a tile.

        None for a layer or step without a map.
        """
        found = self._maps.get((layer, step))
        return None if found is None else found.cpu().view(self._known_grid().tiles)

    def report(self, path: Path | str) -> None:
        """Write a picture of all this (.png), or a page with it and a table (.html).

        Raises:
            ValueError: another ending, or nothing noted.
            ImportError: without matplotlib.
        """
        from vsa.diagnostics import report

        report.write(self, Path(path))

    def _known_grid(self) -> Grid:
        if self.grid is None:
            raise ValueError(
                "this record is empty: no sparse layer ran in a step that it wanted, so run the "
                "model inside of collect, with fewer dense steps or a smaller every"
            )
        return self.grid

    def _table(self, which: int) -> Tensor:
        self._known_grid()
        heads = len(next(iter(self._numbers.values()))[0])
        table = torch.full((self.layers, len(self.steps), heads), float("nan"))
        places = {step: place for place, step in enumerate(self.steps)}
        for (layer, step), numbers in self._numbers.items():
            table[layer, places[step]] = numbers[which].float().cpu()
        return table


# What torch.compiler.disable sets. The decorator itself would load torch._dynamo, as long as torch.
Record.note._torchdynamo_disable = True  # type: ignore[attr-defined]
