# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa train``: held-out loss against steps, operations and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from vsa.diagnostics import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "full": theme.INK,
    "vsa": theme.BLUE,
    "fine": theme.LIGHT_BLUE,
    "coarse": theme.PURPLE,
    "window": theme.ORANGE,
    "random": theme.MUTED,
    "ramp": theme.GREEN,
    "abrupt": theme.BROWN,
}
DASHES = ("-", "--", ":", "-.")
"""Of runs that differ in more than the kind."""
AXES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("training steps", "{x:,.0f}", lambda row: row["step"]),
    ("training FLOPs, counted", "{x:.0e}", lambda row: row["flops"]),
    ("training seconds, measured", "{x:,g}", lambda row: row["train_ms"] / 1e3),
)
"""What is drawn against, how its numbers are written, and where a row stands."""
VARIED = ("size", "grid", "seed", "topk", "batch", "learning_rate", "times", "start")
"""Settings that a legend names where runs differ in them."""


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw runs into one PNG, a colour for each kind and a dash for each run.

    Args:
        runs: what ``provenance.read`` gave of their files.
        path: of the picture.

    Raises:
        KeyError: a file of another command.
        ValueError: runs that have trained nothing.
    """
    if not any(row["step"] for run in runs for row in run["rows"]):
        raise ValueError("at least one run must have taken a step for a curve, but none has")
    with theme.new_figure(12, 4.4, path) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (label, numbers, place) in zip(panels, AXES, strict=True):
            _draw_curves(axes, runs, place)
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(numbers)
            axes.grid(axis="y")
        panels[0].set_ylabel("held-out loss (log scale)")
        figure.legend(handles=_legend(runs), loc="outside lower center", ncols=8)
        theme.title(figure, _caption(runs))


def _draw_curves(
    axes: Axes, runs: Sequence[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], float]
) -> None:
    for number, run in enumerate(runs):
        for kind in run["kinds"]:
            rows = [row for row in run["rows"] if row["kind"] == kind and row["step"]]
            axes.plot(
                [place(row) for row in rows],
                [row["held_out"] for row in rows],
                color=COLOURS[kind],
                linestyle=DASHES[number % len(DASHES)],
                marker="o" if len(rows) == 1 else None,
                linewidth=1.8,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _legend(runs: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    kinds = dict.fromkeys(kind for run in runs for kind in run["kinds"])
    handles = [Line2D([], [], color=COLOURS[kind], label=kind) for kind in kinds]
    if len(runs) > 1:
        varied = [name for name in VARIED if len({str(run[name]) for run in runs}) > 1]
        for number, run in enumerate(runs):
            words = [f"{name.replace('_', ' ')} {_word(run[name])}" for name in varied]
            label = ", ".join(words) or f"run {number + 1}"
            dash = DASHES[number % len(DASHES)]
            handles.append(Line2D([], [], color=theme.MUTED, linestyle=dash, label=label))
    return handles


def _word(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _caption(runs: Sequence[Mapping[str, Any]]) -> str:
    """What was trained, and on what."""
    run = runs[0]
    facts = [
        f"size {'/'.join(dict.fromkeys(each['size'] for each in runs))}",
        f"{'/'.join(dict.fromkeys(_word(each['grid']) for each in runs))} tokens",
        f"batch {run['batch']}",
        f"{run['topk']:g} of the tiles" if run["topk"] <= 1 else f"{run['topk']} tiles",
        f"{run['real']:.0%} real clips, the rest generated",
        run["device"],
        f"PyTorch {run['torch']}",
        f"commit {(run['commit'] or 'unknown')[:12]}",
        run["date"],
    ]
    return "Held-out loss of rectified flow on pixels\n" + fill(", ".join(facts), 150)
