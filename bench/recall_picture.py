# SPDX-License-Identifier: Apache-2.0
"""The picture of bench/recall.py: recall and output error over the budget, by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from vsa.diagnostics import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"mean": theme.BLUE, "sub-blocks 4": theme.ORANGE, "oracle": theme.INK}
DASHES = {"uniform": "-", "calibrated": "--", "calibrated, mean": ":", "calibrated, error": "-."}
LABELS = {
    "uniform": "as many for every head",
    "calibrated": "same total, for the worst head",
    "calibrated, mean": "same total, for the mean",
    "calibrated, error": "same total, for the output's error",
}
MARKERS = {False: "o", True: "x"}
"""Without and with a tail."""
PANELS = (
    ("recall", "mean recall of all heads"),
    ("recall_p5", "5th percentile of recall"),
    ("error", "output error, relative L2"),
    ("gated", "the same behind the gates"),
    ("loss", "held-out loss (line: every tile)"),
)


def draw(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw all rows into one PNG.

    Args:
        head: of the file, with "sources".
        rows: of it.
        path: of the picture.
    """
    names = [source["name"] for source in head["sources"]]
    there = {"gated": any(row["gates"] for row in rows), "loss": any("loss" in x for x in rows)}
    panels = [panel for panel in PANELS if there.get(panel[0], True)]
    with theme.new_figure(3.6 * len(panels), 3.0 * len(names) + 1.1, path) as figure:
        grid = figure.subplots(len(names), len(panels), squeeze=False)
        for source, line in zip(head["sources"], grid, strict=True):
            name = source["name"]
            own = [row for row in rows if row["source"] == name]
            for (key, label), axes in zip(panels, line, strict=True):
                _panel(axes, own, key)
                if key == "loss" and "losses" in source:
                    axes.axhline(source["losses"]["every tile"], color=theme.MUTED, linewidth=0.8)
                axes.set_title(label, fontsize=10, fontweight="normal")
            line[0].set_ylabel(name)
        for axes in grid[-1]:
            axes.set_xlabel("key tiles kept")
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=8)
        theme.title(figure, _caption(head))


def _rows(rows: Sequence[Mapping[str, Any]], panel: str) -> list[Mapping[str, Any]]:
    """What a panel shows: recall has no tail, and a model's loss is behind the gates it has."""
    if panel == "loss":
        return [row for row in rows if "loss" in row]
    own = [row for row in rows if row["gates"] == (panel == "gated")]
    return [row for row in own if not row["tail"]] if panel.startswith("recall") else own


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], panel: str) -> None:
    own, key = _rows(rows, panel), "error" if panel == "gated" else panel
    if not own:  # a model without gates, beside one that has some
        axes.set_visible(False)
        return
    for way in dict.fromkeys((row["score"], row["heads"], row["tail"]) for row in own):
        score, heads, tail = way
        line = [row for row in own if (row["score"], row["heads"], row["tail"]) == way]
        line.sort(key=lambda row: row["topk"])
        axes.plot(
            [row["topk"] for row in line],
            [row[key] for row in line],
            color=COLOURS[score],
            linestyle=DASHES[heads],
            marker=MARKERS[tail],
            markersize=4,
            linewidth=1.4,
        )
    topks = sorted({row["topk"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(topks, [f"{topk:.3g}" for topk in (100 * topk for topk in topks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    share, digits = key.startswith("recall"), 5 if key == "loss" else 3
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}" if share else f"{y:.{digits}g}")
    if key != "loss":
        axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    found = [
        Line2D([], [], color=COLOURS[score], label=score)
        for score in dict.fromkeys(row["score"] for row in rows)
    ]
    for heads in dict.fromkeys(row["heads"] for row in rows):
        dash, label = DASHES[heads], LABELS[heads]
        found.append(Line2D([], [], color=theme.MUTED, linestyle=dash, label=label))
    if any(row["tail"] for row in rows):
        for tail, marker in MARKERS.items():
            label = "with a tail" if tail else "without"
            found.append(Line2D([], [], color=theme.MUTED, marker=marker, ls="", label=label))
    return found


def _caption(head: Mapping[str, Any]) -> str:
    """What was measured, and on what."""
    each = [
        f"{source['name']}, {'x'.join(map(str, source['grid']))} tokens, "
        f"{source.get('clips', '?')} held-out clips"
        for source in head["sources"]
    ]
    facts = [
        *each,
        head["device"],
        f"PyTorch {head['torch']}",
        f"commit {(head['commit'] or 'unknown')[:12]}",
        head["date"],
    ]
    return "What the kept tiles hold of dense attention\n" + fill(", ".join(facts), 150)
