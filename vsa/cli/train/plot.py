# SPDX-License-Identifier: Apache-2.0
"""The picture of ``vsa train``: held-out loss against steps, operations and seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from vsa.cli.train import compare
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
Dash = str | tuple[int, tuple[int, ...]]
DASHES: tuple[Dash, ...] = (
    *("-", "--", ":", "-."),
    *((0, (8, 2, 2, 2, 2, 2)), (0, (1, 3)), (0, (9, 3)), (0, (3, 1, 1, 1))),
)
"""Of runs that differ in more than the kind, by what they differ in."""
WIDE = 60
"""Times the least number of an axis: beyond that fewer of its numbers are written."""
LAW: dict[str, Any] = {"linestyle": (0, (1, 1)), "linewidth": 3, "alpha": 0.45}
"""How a fitted law is drawn."""
AXES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("training steps", "{x:,.0f}", lambda row: row["step"]),
    ("training FLOPs, counted", "{x:.0e}", lambda row: row["flops"]),
    ("training seconds, measured", "{x:,g}", lambda row: row["train_ms"] / 1e3),
)
"""What is drawn against, how its numbers are written, and where a row stands."""
VARIED = ("size", "grid", "seed", "topk", "batch", "learning_rate", "times", "start")
"""Settings that a legend names where runs differ in them."""


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw runs into one PNG: colours are kinds, dashes are settings, dots are fitted laws.

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
        lines = _draw_laws(panels[1], runs) if len(runs) > 1 else 0
        handles = _legend(runs)
        if lines:
            handles.append(Line2D([], [], color=theme.MUTED, **LAW, label="law of a frontier"))
        figure.legend(handles=handles, loc="outside lower center", ncols=8)
        theme.title(figure, _caption(runs))


def _draw_laws(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> int:
    """The law of each kind over the FLOPs that it was fitted to; how many there are."""
    count = 0
    for group in compare.groups(runs):
        for kind, law in compare.laws(group).items():
            if law is not None:
                low, high = law.flops
                places = [low * (high / low) ** (n / 40) for n in range(41)]
                axes.plot(places, [law.loss(x) for x in places], color=COLOURS[kind], **LAW)
                count += 1
    return count


def _draw_curves(
    axes: Axes, runs: Sequence[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], float]
) -> None:
    labels = _labels(runs)
    for run, label in zip(runs, labels, strict=True):
        for kind in run["kinds"]:
            rows = [row for row in run["rows"] if row["kind"] == kind and row["step"]]
            axes.plot(
                [place(row) for row in rows],
                [row["held_out"] for row in rows],
                color=COLOURS[kind],
                linestyle=_dashes(labels)[label],
                marker="o" if len(rows) == 1 else None,
                linewidth=1.8,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < WIDE * low else (1, 3)))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run differs in from others; nothing where they differ in kinds alone."""
    varied = [name for name in VARIED if len({str(run[name]) for run in runs}) > 1]
    return [
        ", ".join(f"{name.replace('_', ' ')} {_word(run[name])}" for name in varied) for run in runs
    ]


def _dashes(labels: Sequence[str]) -> dict[str, Dash]:
    """A dash for each label; they come round again where there are many."""
    return {
        label: DASHES[number % len(DASHES)] for number, label in enumerate(dict.fromkeys(labels))
    }


def _legend(runs: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    kinds = dict.fromkeys(kind for run in runs for kind in run["kinds"])
    handles = [Line2D([], [], color=COLOURS[kind], label=kind) for kind in kinds]
    for label, dash in _dashes(_labels(runs)).items():
        if label:
            handles.append(Line2D([], [], color=theme.MUTED, linestyle=dash, label=label))
    return handles


def _word(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _caption(runs: Sequence[Mapping[str, Any]]) -> str:
    """What was trained, and on what."""
    run = runs[0]
    commits = dict.fromkeys((each["commit"] or "unknown")[:12] for each in runs)
    facts = [
        f"size {'/'.join(dict.fromkeys(each['size'] for each in runs))}",
        f"{'/'.join(dict.fromkeys(_word(each['grid']) for each in runs))} tokens",
        f"batch {run['batch']}",
        f"{run['topk']:g} of the tiles" if run["topk"] <= 1 else f"{run['topk']} tiles",
        f"{run['real']:.0%} real clips, the rest generated"
        + (f" with cuts every {cuts} frames" if (cuts := run.get("cuts", 0)) else ""),
        "/".join(dict.fromkeys(each["device"] for each in runs)),
        f"PyTorch {'/'.join(dict.fromkeys(each['torch'] for each in runs))}",
        f"commit {'/'.join(commits)}",
        "/".join(dict.fromkeys(each["date"] for each in runs)),
    ]
    return "Held-out loss of rectified flow on pixels\n" + fill(", ".join(facts), 140)
