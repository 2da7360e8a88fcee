# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements: a roofline, and what each stage takes.

usage: python bench/draw.py roofline --ceilings ceilings.json --peers peers.json --out roofline.png
       python bench/draw.py stages --rows coarse_select.json --out stages.png
       python bench/draw.py scaling --rows parallel.json --out scaling.png

Roofline: forward TFLOP/s against the products per byte that come from L2. Both ceilings were
measured by bench/ceilings.py: the fastest wgmma, and tiles of 4x4x4 tokens by TMA at the smallest
footprint. The intensity is derived, not measured: a pair of tiles makes 64 FLOP per byte of its K
and V, times the reuse among the query tiles that share loads: ``CONSUMERS`` of them for our
kernels and one for the others. `vsa bench --read` draws what `vsa bench` has measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from comparison.worker import KERNELS
from vsa.diagnostics import theme
from vsa.measure.provenance import read

Row = dict[str, Any]
FLOP_PER_BYTE = 64
CONSUMERS = {128: 3, 64: 4}
"""Query tiles of a block of our forward kernel, by head_dim."""
COLOURS = {"vsa": theme.BLUE, "cudnn_bsa": theme.PINK, "tk_vsa": theme.TEAL, "flex": theme.INK}
"""Of kernels. Ours is blue, as its results are everywhere; the others mean nothing elsewhere."""
MARKERS = {"random": "o", "correlated": "s", "captured": "^"}
MODELS = {
    "480p": "Wan2.1-1.3B at 480p: 21x30x52 tokens, 12 heads of 128",
    "720p": "Wan2.1-14B at 720p: 21x45x80 tokens, 40 heads of 128",
}
"""What the videos of bench/coarse_select.py are layers of."""
EVEN = "even shares"
"""The case of bench/parallel.py that is drawn."""
LINES = theme.BLUE, theme.ORANGE, theme.GREEN, theme.PURPLE, theme.PINK, theme.BROWN
"""Colours of its shapes."""
WHOLE = "attention, inference"
"""Rows of bench/coarse_select.py that are the whole operation."""


def ceilings(rows: Sequence[Row]) -> tuple[float, dict[int, float]]:
    """Tensor cores in TFLOP/s, and L2 by head_dim in TB/s.

    Raises:
        ValueError: a file without these groups.
    """
    tensor = [row["TFLOP/s"] for row in rows if row.get("probe") == "wgmma"]
    loads = [row for row in rows if row.get("probe") == "loads"]
    loads = [row for row in loads if row["by"] == "TMA" and row["users"] == 0]
    if not tensor or not loads:
        raise ValueError("the ceilings must have rows of the groups wgmma and loads, but lack some")
    smallest = min(row["footprint"] for row in loads)
    return max(tensor), {row["d"]: row["TB/s"] for row in loads if row["footprint"] == smallest}


def intensity(row: Row) -> float:
    """FLOP per byte from L2 of a forward row."""
    if row["kernel"] != "vsa":
        return FLOP_PER_BYTE
    consumers = CONSUMERS[row["head_dim"]]
    if str(consumers) not in row["reuse"]:
        raise ValueError(f"the peers' rows do not tell the reuse among {consumers} query tiles")
    return FLOP_PER_BYTE * float(row["reuse"][str(consumers)])


def roofline(measured: Row, machine: Row, path: Path) -> None:
    """One panel per head_dim, written to a PNG."""
    tensor, bandwidth = ceilings(machine["rows"])
    if machine["device"] != measured["device"]:
        of = f"{measured['device']} and {machine['device']}"
        raise ValueError(f"both files must be of one kind of GPU, but are of {of}")
    rows = [row for row in measured["rows"] if "tflops" in row and row["direction"] == "forward"]
    rows = [row for row in rows if row["kernel"] in COLOURS and row["head_dim"] in bandwidth]
    if not rows:
        raise ValueError("the peers must have forward rows of a block-sparse kernel, but have none")
    head_dims = sorted({row["head_dim"] for row in rows}, reverse=True)
    with theme.new_figure(5.4 * len(head_dims) + 0.6, 4.8, path) as figure:
        panels = figure.subplots(1, len(head_dims), squeeze=False, sharey=True)[0]
        for axes, head_dim in zip(panels, head_dims, strict=True):
            mine = [row for row in rows if row["head_dim"] == head_dim]
            _panel(axes, mine, tensor, bandwidth[head_dim])
            axes.set_title(f"head_dim {head_dim}")
        panels[0].set_ylabel("forward, TFLOP/s on selected tokens")
        _legend(figure, rows)
        commit = (measured["commit"] or "unknown")[:12]
        text = f"Forward of block-sparse kernels, bf16; {measured['device']}, commit {commit}"
        theme.title(figure, f"{text}, {measured['date']}; ceilings of {machine['date']}")


def _panel(axes: Axes, rows: Sequence[Row], tensor: float, tera: float) -> None:
    low, high = FLOP_PER_BYTE / 2, FLOP_PER_BYTE * (max(CONSUMERS.values()) + 1)
    ridge = tensor / tera
    axes.plot([low, ridge, high], [low * tera, tensor, tensor], color=theme.MUTED, linewidth=1.8)
    axes.annotate(f"tensor cores {tensor:.0f}", (high, tensor), (-4, 5), ha="right", **SMALL)
    axes.annotate(f"L2 {tera:.1f} TB/s", (low * 1.1, low * 1.1 * tera), (8, -4), **SMALL)
    for row in rows:
        style: dict[str, Any] = {"color": COLOURS[row["kernel"]], "marker": MARKERS[row["pattern"]]}
        axes.plot(intensity(row), row["tflops"], linestyle="", markersize=8, **style)
    axes.set_xscale("log", base=2)
    ticks = [FLOP_PER_BYTE * factor for factor in (0.5, 1, 2, 4)]
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.set(xlim=(low, high), ylim=(0, tensor * 1.12), xlabel="FLOP per byte from L2 (derived)")
    axes.grid()


SMALL: dict[str, Any] = {"textcoords": "offset points", **theme.SMALL}


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    point: dict[str, Any] = {"linestyle": "", "markersize": 8}
    names = [name for name in COLOURS if any(row["kernel"] == name for row in rows)]
    kinds = [kind for kind in MARKERS if any(row["pattern"] == kind for row in rows)]
    handles = [
        Line2D([], [], marker="D", color=COLOURS[x], label=KERNELS[x].title, **point) for x in names
    ]
    handles += [
        Line2D([], [], marker=MARKERS[x], color=theme.MUTED, label=f"{x} pattern", **point)
        for x in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def parts(rows: Sequence[Row]) -> dict[str, float]:
    """Stages of one video's inference: the fastest way of each in ms, no part counted twice."""
    found: dict[str, float] = {}
    for row in rows:
        if ", " not in row["stage"]:  # whole calls and gradients
            found[row["stage"]] = min(row["ms"], found.get(row["stage"], row["ms"]))
    of = {name: set(name.split(" + ")) for name in found}
    return {
        name: ms for name, ms in found.items() if not any(of[name] < other for other in of.values())
    }


def stages(measured: Row, path: Path) -> None:
    """A panel per video: its stages stacked, the whole of inference below; written to a PNG."""
    videos = list(dict.fromkeys(row["shape"] for row in measured["rows"]))
    colours: dict[str, str] = {}
    with theme.new_figure(8.4, 1.2 + 2.1 * len(videos), path) as figure:
        panels = figure.subplots(len(videos), squeeze=False)[:, 0]
        for axes, video in zip(panels, videos, strict=True):
            rows = [row for row in measured["rows"] if row["shape"] == video]
            _bars(axes, rows, colours)
            axes.set_title(MODELS.get(video, video))
        axes.set_xlabel("ms")
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
        commit = (measured["commit"] or "unknown")[:12]
        text = f"Inference of vsa.attention, bf16, 12.5 % of the tiles kept; {measured['device']}"
        theme.title(figure, f"{text}, commit {commit}, {measured['date']}")


def _bars(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Stages one after the other, whole calls below; colours are noted by stage."""
    left = 0.0
    for name, ms in parts(rows).items():
        colour = colours.setdefault(name, theme.STAGES[len(colours) % len(theme.STAGES)])
        axes.barh(0, ms, 0.7, left, color=colour)
        left += ms
    whole = {row["what"]: row["ms"] for row in rows if row["stage"] == WHOLE}
    bars = {"stage after stage": left, **{f"whole, {x}": ms for x, ms in whole.items()}}
    for place, ms in enumerate(bars.values()):
        if place:
            axes.barh(place, ms, 0.7, color=theme.PALE)
        axes.annotate(f"{ms:.2f} ms", (ms, place), (5, 0), va="center", **SMALL)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(bars.values()))


def scaling(measured: Row, path: Path) -> None:
    """Eager calls of bench/parallel.py on several GPUs over one, by shape; written to a PNG."""
    rows = [row for row in measured["rows"] if row["mode"] == "eager" and row["case"] == EVEN]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    counts = sorted({row["ranks"] for row in rows})
    with theme.new_figure(8.4, 4.4, path) as figure:
        panels = figure.subplots(1, len(theme.DIRECTIONS), sharey=True)
        for axes, what in zip(panels, theme.DIRECTIONS, strict=True):
            axes.plot(counts, counts, color=theme.PALE, linestyle="--", label="as many times")
            for shape, colour in zip(shapes, LINES, strict=False):
                gains = gains_of(
                    [row for row in rows if (row["shape"], row["what"]) == (shape, what)]
                )
                axes.plot(*zip(*gains.items(), strict=True), color=colour, marker="o", label=shape)
                last = max(gains)
                axes.annotate(f"{gains[last]:.2f}", (last, gains[last]), (6, -3), **SMALL)
            axes.set(title=what, xlabel="GPUs", xticks=counts)
            axes.grid()
        panels[0].set_ylabel("times the speed of one")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        commit = (measured["commit"] or "unknown")[:12]
        text = f"A layer over several GPUs, {measured['device']}, commit {commit}"
        theme.title(figure, f"{text}, {measured['date']}")


def gains_of(rows: Sequence[Row]) -> dict[int, float]:
    """Of one shape and direction: how often as fast as one GPU, by their number, by default."""
    (one,) = [row["ms"] for row in rows if row["ranks"] == 1][:1]
    found = {1: 1.0}
    for row in rows:
        if row["ranks"] > 1:
            found.setdefault(row["ranks"], one / row["ms"])  # the first way is the default one
    return found


def main() -> None:
    """Read JSON, write a PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    roof = kinds.add_parser("roofline", help="TFLOP/s below the ceilings")
    roof.add_argument("--ceilings", type=Path, required=True, metavar="FILE")
    roof.add_argument("--peers", type=Path, required=True, metavar="FILE")
    bars = kinds.add_parser("stages", help="stacked bars of bench/coarse_select.py")
    bars.add_argument("--rows", type=Path, required=True, metavar="FILE")
    lines = kinds.add_parser("scaling", help="speed-up of bench/parallel.py by GPUs")
    lines.add_argument("--rows", type=Path, required=True, metavar="FILE")
    for each in (roof, bars, lines):
        each.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png file")
    options = parser.parse_args()
    try:
        if options.kind == "roofline":
            roofline(read(options.peers), read(options.ceilings), options.out)
        elif options.kind == "scaling":
            scaling(read(options.rows), options.out)
        else:
            stages(read(options.rows), options.out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
