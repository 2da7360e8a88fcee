# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa bench``: speed-up over dense attention, beside the limit, and stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, cast

from vsa.cli.bench.stage_table import REST, parts
from vsa.cli.bench.table import CHOSEN
from vsa.diagnostics import theme
from vsa.measure import stage_hooks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vsa.cli.bench.measurement import Measurement

WIDTH = 8.0
"""Inches; read at two thirds of its 1,200 pixels, nothing is smaller than 11 pixels."""
STAGES = dict(zip((*stage_hooks.FORWARD, *stage_hooks.BACKWARD), theme.STAGES, strict=True))
STAGES[REST] = theme.PALE
BAR = 0.23
"""Inches of a bar."""


def draw(measurements: list[Measurement], about: str, dense: str, path: Path) -> None:
    """Bars of the speed-up, a group per layer and density, and stages below; a PNG.

    Args:
        measurements: the rows.
        about: the machine and its versions.
        dense: the kernel of dense attention.
        path: of the picture.
    """
    cases = list(dict.fromkeys((row.shape, row.kept, row.tiles) for row in measurements))
    directions = list(dict.fromkeys(row.direction for row in measurements))
    with _panels(measurements, path, 1.1 + BAR * len(cases) * (len(directions) + 0.6)) as axes:
        _draw_bars(axes, measurements, cases, directions)
        axes.set_xlabel(f"times faster than dense attention ({dense})")
        theme.legend_above(axes)
        theme.title(_figure(axes), _caption(measurements, about))


def _draw_bars(
    axes: Axes,
    measurements: list[Measurement],
    cases: list[tuple[str, int, int]],
    directions: list[str],
) -> None:
    height = 0.8 / len(directions)
    for offset, direction in enumerate(directions):
        rows = [row for row in measurements if row.direction == direction]
        places = [
            cases.index((row.shape, row.kept, row.tiles)) + (offset + 0.5) * height - 0.4
            for row in rows
        ]
        gains = [row.dense / row.sparse for row in rows]
        bars = axes.barh(places, gains, height, color=theme.DIRECTIONS[direction], label=direction)
        axes.bar_label(bars, fmt="%.1fx", fontsize=9, padding=2)
    for place, (_, kept, tiles) in enumerate(cases):
        limit = axes.vlines(
            tiles / kept, place - 0.45, place + 0.45, colors=theme.MUTED, linestyles="dashed"
        )
    limit.set_label("limit: all tiles / tiles kept")
    axes.axvline(1, color=theme.PALE, linewidth=0.8)
    axes.set_yticks(range(len(cases)), _names(measurements, cases), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(tiles / kept for _, kept, tiles in cases))


def _names(measurements: list[Measurement], cases: list[tuple[str, int, int]]) -> list[str]:
    """Of groups of bars; heads stand in them where they differ, else in the caption."""
    heads = {row.shape: f": {row.heads} heads of {row.head_dim}" for row in measurements}
    if len(set(heads.values())) == 1:
        heads = dict.fromkeys(heads, "")
    return [f"{shape}{heads[shape]}\n{kept:,} of {tiles:,} tiles" for shape, kept, tiles in cases]


def draw_sweep(
    measurements: list[Measurement], sweep: str, about: str, dense: str, path: Path
) -> None:
    """Lines of the speed-up over length or density, one per direction and layer; a PNG.

    Args:
        measurements: the rows.
        sweep: "length" or "density".
        about: the machine and its versions.
        dense: the kernel of dense attention.
        path: of the picture.
    """
    with _panels(measurements, path, 4.6) as axes:
        _draw_lines(axes, measurements, sweep)
        axes.set_ylabel(f"times faster than dense attention\n({dense})")
        axes.legend()
        theme.title(_figure(axes), _caption(measurements, about))


def _draw_lines(axes: Axes, measurements: list[Measurement], sweep: str) -> None:
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
            color=theme.DIRECTIONS[direction],
            marker="os^Dv<>"[layers.index(layer) % 7],
            label=direction if len(layers) == 1 else f"{direction}, {layer}",
        )
    limits = {place(row): row.tiles / row.kept for row in measurements}
    points = sorted(limits)
    axes.plot(
        points,
        [limits[x] for x in points],
        color=theme.MUTED,
        ls="--",
        label="limit: all tiles / tiles kept",
    )
    axes.axhline(1, color=theme.PALE, linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = [f"{x:.1%}" if sweep == "density" else f"{x / 1024:.0f}k" for x in points]
    axes.set_xticks(points, ticks)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("share of key tiles kept" if sweep == "density" else "tokens")


def _caption(rows: list[Measurement], about: str) -> str:
    """What was measured, and on what."""
    patterns = {row.pattern for row in rows} - {CHOSEN}
    what = "The fine stage" if patterns else "vsa.attention, whole,"
    facts = [f"{what} against dense attention"]
    heads = sorted({(row.heads, row.head_dim) for row in rows})
    if len(heads) == 1:
        facts.append("{} heads of {}".format(*heads[0]))
    elif len({head_dim for _, head_dim in heads}) == 1:
        facts.append(f"head_dim {heads[0][1]}")
    if _alike(rows):
        facts.append(f"{median(row.kept / row.tiles for row in rows):.1%} of the tiles kept")
    if patterns:
        facts.append(f"sparsity pattern: {', '.join(sorted(patterns))}")
    return fill(", ".join(facts).replace(",,", ","), 100) + "\n" + fill(about, 100)


@contextmanager
def _panels(measurements: list[Measurement], path: Path, height: float) -> Iterator[Axes]:
    """Where speed-ups go; below, the stages of all rows that have them. Written in the end."""
    rows = [row for row in measurements if row.stages]
    if not rows:
        with theme.new_figure(WIDTH, height, path) as figure:
            yield figure.subplots()
        return
    below = 1.2 + BAR * len(rows)
    with theme.new_figure(WIDTH, height + below, path) as figure:
        axes, bars = figure.subplots(2, 1, height_ratios=[height, below])
        _draw_stages(bars, rows)
        theme.legend_above(bars)
        yield axes


def _figure(axes: Axes) -> Figure:
    return cast("Figure", axes.get_figure(root=True))


def _alike(rows: list[Measurement]) -> bool:
    """Whether all keep the same share of their tiles, but for rounding to whole tiles."""
    shares = [row.kept / row.tiles for row in rows]
    return max(shares) < 1.05 * min(shares)


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
        axes.annotate(f" {whole * 1e3:,.2f} ms", (1.0, i), va="center", fontsize=8.5)
    several = not _alike(rows)
    names = [
        f"{row.shape}{f', {row.kept / row.tiles:.0%}' * several}, {row.direction}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("stages, as a share of their time, called one by one")
