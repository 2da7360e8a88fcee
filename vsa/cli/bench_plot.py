# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa bench``: speed-up over dense attention, beside the limit."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from vsa.cli.bench_case import Measurement

COLOURS = {"forward": "#0072b2", "forward+backward": "#e69f00"}


def draw(measurements: list[Measurement], machine: str, path: Path) -> None:
    """Grouped bars, one group per layer and density, written to a PNG."""
    cases = list(dict.fromkeys((row.shape, row.kept, row.tiles) for row in measurements))
    directions = list(dict.fromkeys(row.direction for row in measurements))
    figure = Figure(figsize=(max(6.0, 1.6 * len(cases) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
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
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
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
