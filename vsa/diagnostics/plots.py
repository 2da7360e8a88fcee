# SPDX-License-Identifier: Apache-2.0
"""Pictures of selections, as PNG files; the numbers in them are from ``vsa.diagnostics``.

They are drawn by matplotlib, which is part of the extra ``demo``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vsa.diagnostics import metrics
from vsa.diagnostics.theme import BLUE, FAINT, INK, LIGHT_BLUE, MUTED, ORANGE, new_figure, shades
from vsa.values import bitmap
from vsa.values.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from vsa.diagnostics import PrecisionErrors, RecallCurve

MOST_WRITTEN_HEADS = 16
"""With more heads, shares are shown by colour alone."""


def recall(curve: RecallCurve, path: Path | str) -> None:
    """Recall against density, a line per head, batch elements averaged.

    Args:
        curve: from ``metrics.recall_curve``.
        path: the PNG to write.
    """
    density, kept = curve.density.mean(1).cpu(), curve.recall.float().mean(1).cpu()  # (n, heads)
    order = density.mean(1).argsort()
    density, kept = density[order], kept[order]
    with new_figure(7.5, 4.6, path) as figure:
        axes = figure.subplots()
        low = float(density.min())
        random = torch.logspace(math.log10(low), 0, 50).tolist()
        axes.plot(random, random, color=MUTED, linewidth=1.5, linestyle=(0, (4, 2)))
        axes.plot(density.numpy(), kept.numpy(), color=LIGHT_BLUE, linewidth=1)
        mean = density.mean(1).tolist(), kept.mean(1).tolist()
        axes.plot(*mean, color=BLUE, linewidth=2.5, marker="o")
        _name_lines(axes, density[0], kept[0], kept.mean(0))
        axes.set_xscale("log")
        axes.set_xlim(min(low**1.45, low / 1.5), 1.04)  # room for names on the left
        ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= low * 0.8]
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.set(ylim=(0, 1.03), xlabel="key tiles kept (log scale)")
        axes.set_title("Share of dense attention on the kept tiles")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)


def _name_lines(axes: Axes, density: Tensor, kept: Tensor, average: Tensor) -> None:
    """Names where lines begin: the mean, chance, the heads with the most and least on average."""
    x, best, worst = float(density.mean()), int(average.argmax()), int(average.argmin())
    names = [(float(kept.mean()), "mean of heads", BLUE), (x, "random tiles", MUTED)]
    if len(kept) > 2:
        names += [(float(kept[best]), f"best on average: head {best}", INK)]
        names += [(float(kept[worst]), f"worst on average: head {worst}", INK)]
    lowest = 0.0
    for y, name, colour in sorted(names):
        lowest = max(y, lowest + 0.05)
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center"}
        weight = "bold" if colour == BLUE else "normal"
        axes.annotate(name, (x, lowest), (-9, 0), color=colour, fontweight=weight, **style)


def head_overlap(selection: Selection, path: Path | str) -> None:
    """Which heads choose the same tiles, and how many each keeps; batch elements averaged.

    Args:
        selection: of one layer.
        path: the PNG to write.
    """
    shares = metrics.head_overlap(selection).mean(0).cpu()
    density = metrics.density(selection).mean(0).cpu()
    heads = len(shares)
    side = min(9.0, max(4.0, 0.36 * heads + 1.4))
    with new_figure(side + 2.6, side, path) as figure:
        matrix, bars = figure.subplots(1, 2, width_ratios=(side, 1.6))
        image = matrix.imshow(shares.numpy(), cmap=shades(), vmin=0, vmax=1)
        matrix.set_title("Tiles that two heads have in common")
        matrix.set(xlabel="head", ylabel="head")
        ticks = range(0, heads, math.ceil(heads / 20))
        matrix.set_xticks(ticks)
        matrix.set_yticks(ticks)
        matrix.spines[:].set_visible(False)
        matrix.tick_params(length=0)
        if heads <= MOST_WRITTEN_HEADS:
            _write_shares(matrix, shares)
        add_scale(figure, image, matrix, ("0", "50%", "100%"))
        bars.barh(range(heads), density.tolist(), color=BLUE, height=0.7)
        bars.set_ylim(heads - 0.5, -0.5)
        bars.set_yticks([])
        most = float(density.max())
        bars.set_xticks([0, most], ["0", f"{most:.0%}"])
        bars.set_title("key tiles kept", fontsize=10, fontweight="normal")
        bars.spines["left"].set_visible(False)


def _write_shares(axes: Axes, shares: Tensor) -> None:
    for row, column in torch.cartesian_prod(*[torch.arange(len(shares))] * 2).tolist():
        share = float(shares[row, column])
        if row != column and not math.isnan(share):
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            colour = "white" if share > 0.45 else INK
            axes.text(column, row, f"{100 * share:.0f}", color=colour, **style)


def tile_map(
    selection: Selection,
    query: int | tuple[int, int, int],
    path: Path | str,
    *,
    head: int | None = None,
    batch: int = 0,
) -> None:
    """The key tiles that one query tile attends, layer by layer along t.

    Args:
        selection: one that knows its grids.
        query: the query tile, its number or its place (t, h, w) among the tiles.
        path: the PNG to write.
        head: whose choice; None for the share of heads that keep each tile.
        batch: which batch element.

    Raises:
        ValueError: a selection without grids, or a query tile, head or batch that it has not.
    """
    if selection.grid is None or selection.kv_grid is None:
        raise ValueError(
            "selection must know its grids for tiles to be drawn where they lie: "
            "pass grid= to Selection.from_mask"
        )
    at = _place(query, selection.grid.tiles)
    _in_range("batch", batch, selection.shape[0])
    if head is not None:
        _in_range("head", head, selection.shape[1])
    layers, rows, columns = selection.kv_grid.tiles
    words = selection.bitmap[batch].unflatten(1, selection.grid.tiles)[:, at[0], at[1], at[2]]
    words = words if head is None else words[head, None]
    kept = bitmap.unpack(words, selection.num_key_tiles).float().cpu()
    shares = kept.mean(0).view(layers, rows, columns)

    across = _panels_across(layers, rows, columns)
    down = math.ceil(layers / across)
    cell = min(0.26, 11 / (across * columns))
    width, height = across * (columns * cell + 0.15), down * (rows * cell + 0.3)
    with new_figure(max(6.5, width + 1.2 * (head is None)), height + 0.5, path) as figure:
        panels = list(figure.subplots(down, across, squeeze=False).flat)
        for axes in panels:
            axes.axis("off")
        for layer, axes in enumerate(panels[:layers]):
            image = axes.pcolormesh(
                shares[layer].numpy(), cmap=shades(), vmin=0, vmax=1, edgecolor="w"
            )
            axes.set(aspect="equal", xlim=(0, columns), ylim=(rows, 0))
            axes.set_title(f"t = {layer}", fontsize=9, fontweight="normal", color=MUTED, pad=3)
        if selection.grid.tiles == selection.kv_grid.tiles:
            outline(panels[at[0]], at)
        who = f"mean of {len(kept)} heads" if head is None else f"head {head}"
        figure.suptitle(
            f"Query tile {at} keeps {float(kept.sum(1).mean()):.3g} of {selection.num_key_tiles} "
            f"key tiles ({who})",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        if head is None:
            add_scale(figure, image, panels, ("no head", "half", "all heads"))


def precision_errors(errors: PrecisionErrors, path: Path | str) -> None:
    """Errors of low precision by layer and head, a panel for each precision; all steps together.

    Args:
        errors: of a model.
        path: the PNG to write.

    Raises:
        ValueError: nothing noted.
    """
    tables = {each: errors.of(each) for each in errors.precisions}
    layers, heads = next(iter(tables.values())).shape
    most = max(float(table.nan_to_num(0).max()) for table in tables.values())
    width, height = min(6.0, max(3.0, 0.3 * heads + 1.0)), min(9.0, max(2.4, 0.2 * layers + 1.2))
    with new_figure(width * len(tables) + 1.2, height, path) as figure:
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            image = axes.imshow(
                table.numpy(), cmap=shades(), vmin=0, vmax=most, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_xticks(range(0, heads, math.ceil(heads / 12)))
            axes.set_yticks(range(0, layers, math.ceil(layers / 20)))
            axes.set(xlabel="head", title=name)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        panels[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
        bar.set_ticks([0, most / 2, most], labels=[f"{x:.3f}" for x in (0, most / 2, most)])
        cast("Any", bar.outline).set_visible(False)
        figure.suptitle(
            "What low precision changes in a head's output, relative to native",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )


def _panels_across(layers: int, rows: int, columns: int) -> int:
    """How many layers to put side by side for a picture about twice as wide as high."""

    def strangeness(across: int) -> float:
        return abs(math.log(across * columns / (math.ceil(layers / across) * rows) / 2))

    return min(range(1, layers + 1), key=strangeness)


def outline(axes: Axes, at: tuple[int, int, int]) -> None:
    """The query tile itself."""
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((at[2], at[1]), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False)
    )


def add_scale(
    figure: Figure | SubFigure, image: Any, beside: Any, names: tuple[str, str, str]
) -> None:
    """A scale beside some axes, with names for 0, one half and 1."""
    bar = figure.colorbar(image, ax=beside, fraction=0.04, pad=0.02, shrink=0.9, panchor=False)
    bar.set_ticks([0, 0.5, 1], labels=names)
    cast("Any", bar.outline).set_visible(False)


def _place(query: int | tuple[int, int, int], tiles: tuple[int, int, int]) -> tuple[int, int, int]:
    """Where a query tile stands among the tiles, (t, h, w)."""
    if isinstance(query, int):
        _in_range("query", query, math.prod(tiles))
        return query // (tiles[1] * tiles[2]), query // tiles[2] % tiles[1], query % tiles[2]
    for axis, (place, count) in enumerate(zip(query, tiles, strict=True)):
        _in_range(f"query[{axis}]", place, count)
    return query


def _in_range(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name} must be from 0 to {count - 1} here, but it is {value}")
