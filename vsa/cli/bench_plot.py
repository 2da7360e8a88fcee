# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa bench``: speed-up over dense attention, beside the limit, and stages."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vsa import stages
from vsa.cli.stage_table import REST, parts

if TYPE_CHECKING:
    from vsa.cli.bench_case import Measurement

COLOURS = {"forward": "#0072b2", "forward+backward": "#e69f00"}
STAGES = {
    stages.COARSE: "#56b4e9",
    stages.SELECT: "#f0e442",
    stages.FINE: "#0072b2",
    stages.COMBINE: "#009e73",
    stages.FINE_BACKWARD: "#e69f00",
    stages.MEANS_BACKWARD: "#cc79a7",
    REST: "0.7",
}
BAR = 0.34
"""Inches of a bar of stages."""


def draw(measurements: list[Measurement], machine: str, path: Path) -> None:
    """Grouped bars, one group per layer and density, written to a PNG."""
    cases = list(dict.fromkeys((row.shape, row.kept, row.tiles) for row in measurements))
    directions = list(dict.fromkeys(row.direction for row in measurements))
    figure, axes = _panels(measurements, (max(6.0, 1.6 * len(cases) + 3), 4.2))
    width = 0.8 / len(directions)
    for offset, direction in enumerate(directions):
        rows = [row for row in measurements if row.direction == direction]
        places = [
            cases.index((row.shape, row.kept, row.tiles)) + (offset + 0.5) * width - 0.4
            for row in rows
        ]
        bars = axes.bar(
            places,
            [row.dense / row.sparse for row in rows],
            width,
            color=COLOURS[direction],
            label=direction,
        )
        axes.bar_label(bars, fmt="%.1fx", fontsize=9)
    for place, (_, kept, tiles) in enumerate(cases):
        limit = axes.hlines(
            tiles / kept, place - 0.45, place + 0.45, colors="0.3", linestyles="dashed"
        )
    limit.set_label("all tiles / tiles kept")
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set_xticks(
        range(len(cases)),
        [f"{shape}\n{kept} of {tiles} tiles" for shape, kept, tiles in cases],
    )
    axes.set_ylabel("times faster than dense attention")
    axes.set_ylim(0, max(tiles / kept for _, kept, tiles in cases) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(fill(machine, 90), fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)


def draw_sweep(measurements: list[Measurement], sweep: str, machine: str, path: Path) -> None:
    """Lines of the speed-up over length or density, one per direction and layer; a PNG."""
    figure, axes = _panels(measurements, (7.0, 4.4))
    lines: dict[tuple[str, str], list[Measurement]] = {}
    for row in measurements:
        layer = row.shape if sweep == "density" else ""
        lines.setdefault((row.direction, layer), []).append(row)
    layers = list(dict.fromkeys(layer for _, layer in lines))

    def place(row: Measurement) -> float:
        return row.kept / row.tiles if sweep == "density" else math.prod(row.grid)

    for (direction, layer), rows in lines.items():
        axes.plot(
            [place(row) for row in rows],
            [row.dense / row.sparse for row in rows],
            color=COLOURS[direction],
            marker="os^Dv<>"[layers.index(layer) % 7],
            label=f"{direction} {layer}".strip(),
        )
    limits = {place(row): row.tiles / row.kept for row in measurements}
    points = sorted(limits)
    axes.plot(
        points, [limits[x] for x in points], color="0.3", ls="--", label="all tiles / tiles kept"
    )
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = [f"{x:.3g}" if sweep == "density" else f"{x / 1024:.0f}k" for x in points]
    axes.set_xticks(points, ticks)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("share of key tiles kept" if sweep == "density" else "tokens")
    axes.set_ylabel("times faster than dense attention")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(fill(machine, 90), fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)


def _panels(measurements: list[Measurement], size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure and where its speed-ups go; below, the stages of all rows that have them."""
    rows = [row for row in measurements if row.stages]
    width, height = size
    if not rows:
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()
    below = 1.2 + BAR * len(rows)
    figure = Figure(figsize=(max(width, 8.0), height + below), layout="constrained")
    axes, bars = figure.subplots(2, 1, height_ratios=[height, below])
    _draw_stages(bars, rows)
    figure.legend(
        handles=bars.containers, frameon=False, fontsize=8, ncols=4, loc="outside lower center"
    )
    return figure, axes


def _draw_stages(axes: Axes, rows: list[Measurement]) -> None:
    """A bar for each row, cut into stages by their share of its time."""
    ends = [0.0] * len(rows)
    for stage, colour in STAGES.items():
        begins = ends.copy()
        for i, row in enumerate(rows):
            found = [times.get(stage, 0.0) for times in parts(row.stages).values()]
            whole = sum(row.stages[direction] for direction in parts(row.stages))
            ends[i] += sum(found) / whole
        shares = [end - begin for begin, end in zip(begins, ends, strict=True)]
        if any(shares):
            axes.barh(range(len(rows)), shares, 0.8, begins, color=colour, label=stage)
    for i, row in enumerate(rows):
        whole = sum(row.stages[direction] for direction in parts(row.stages))
        axes.annotate(f" {whole * 1e3:,.2f} ms", (1.0, i), va="center", fontsize=8)
    names = [f"{row.shape}, {row.kept / row.tiles:.3g}, {row.direction}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}" if x <= 1 else "")
    axes.set_xlabel("share of the time, called stage by stage")
    axes.spines[["top", "right"]].set_visible(False)
