# SPDX-License-Identifier: Apache-2.0
"""The picture of bench/precision.py: errors by layer, and what they become in a denoising loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from precision_measures import CHOSEN, DENSE, EXACT, SPARSITY
from vsa.diagnostics import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "native": theme.MUTED,
    "int8": theme.BLUE,
    "fp8": theme.ORANGE,
    SPARSITY: theme.INK,
    DENSE: theme.INK,
    CHOSEN: theme.GREEN,
    EXACT: theme.MUTED,
}


def draw(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw all rows into one PNG, a line of panels for each source.

    Args:
        head: of the file, with "sources".
        rows: of it.
        path: of the picture.
    """
    names = [source["name"] for source in head["sources"]]
    columns = 1 + any(row["what"] == "model" for row in rows)
    with theme.new_figure(5.2 * columns, 3.2 * len(names) + 0.9, path) as figure:
        grid = figure.subplots(len(names), columns, squeeze=False)
        for name, line in zip(names, grid, strict=True):
            own = [row for row in rows if row["source"] == name]
            _layers(line[0], [row for row in own if row["what"] == "layer"])
            line[0].set_ylabel(name)
            models = [row for row in own if row["what"] == "model"]
            if models:
                _loops(line[1], models)
            elif columns > 1:
                line[1].set_visible(False)
        theme.title(figure, _caption(head))


def _layers(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The mean of the heads as a line, from the best to the worst head as a band."""
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        colour, places = COLOURS[precision], range(len(own))
        dash = ":" if precision == SPARSITY else "-"
        mean = [row["error"] for row in own]
        axes.plot(places, mean, color=colour, linestyle=dash, marker="o", ms=3, label=precision)
        low, high = ([f(row["error_by_head"]) for row in own] for f in (min, max))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (band: all heads)")
    axes.set_title("output error, relative L2 against fp64", fontsize=10, fontweight="normal")
    axes.grid(axis="y")
    axes.legend(ncols=2)


def _loops(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Distance to the native sample after every step."""
    for row in rows:
        name, steps = row["precision"], row["to_native_by_step"]
        if name == "native":
            continue
        dash = ":" if name in (DENSE, EXACT) else "-"
        places = range(1, len(steps) + 1)
        axes.plot(places, steps, color=COLOURS[name], linestyle=dash, label=name)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("denoising step")
    axes.set_title("distance to the native sample", fontsize=10, fontweight="normal")
    axes.grid(axis="y")
    axes.legend(ncols=2)


def _caption(head: Mapping[str, Any]) -> str:
    """What was measured, and on what."""
    each = [
        f"{source['name']}, {'x'.join(map(str, source['grid']))} tokens, "
        f"{source.get('clips', '?')} held-out clips"
        for source in head["sources"]
    ]
    facts = [
        *each,
        f"{head['topk']:.1%} of the tiles",
        head["device"],
        f"backend {head['backend']}",
        f"PyTorch {head['torch']}",
        f"commit {(head['commit'] or 'unknown')[:12]}",
        head["date"],
    ]
    return "What low precision changes in trained models\n" + fill(", ".join(facts), 110)
