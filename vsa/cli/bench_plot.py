# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa bench``: speed-up over dense attention, beside the limit."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from vsa.cli.bench import Measurement

COLOURS = {"forward": "#0072b2", "forward+backward": "#e69f00"}


def draw(measurements: list[Measurement], machine: str, path: Path) -> None:
    """Grouped bars, one group per grid and density, written to a PNG."""
    cases = list(dict.fromkeys((row.grid, row.kept, row.tiles) for row in measurements))
    directions = list(dict.fromkeys(row.direction for row in measurements))
    figure = Figure(figsize=(max(6.0, 1.6 * len(cases) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(directions)
    for offset, direction in enumerate(directions):
        rows = [row for row in measurements if row.direction == direction]
        places = [
            cases.index((row.grid, row.kept, row.tiles)) + (offset + 0.5) * width - 0.4
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
        [f"{'x'.join(map(str, grid))}\n{kept} of {tiles} tiles" for grid, kept, tiles in cases],
    )
    axes.set_ylabel("times faster than dense attention")
    axes.set_ylim(0, max(tiles / kept for _, kept, tiles in cases) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(fill(machine, 90), fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)
