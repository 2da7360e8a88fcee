# SPDX-License-Identifier: Apache-2.0
"""How every picture of the project looks: one palette, one style, and the ways to write a PNG.

matplotlib draws them. It is part of the extra ``demo``, so it is imported only when one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vsa.installation import DISTRIBUTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, PALE, FAINT = "#222222", "#6b6b6b", "#c4c4c4", "#e4e4e4"
"""Text; text that matters less, and limits; bars of what is compared with; lines of a grid."""
BLUE, ORANGE, LIGHT_BLUE = "#0b5cad", "#e8590c", "#8fb8de"
"""Blue is what sparse attention does. Orange is its opposite in the picture: the query tile of a
map, the second line of a plot. They differ for every kind of colour vision."""
GREEN, PURPLE, LIGHT_PURPLE = "#2f9e44", "#9c36b5", "#d9bfe3"
SAND, BROWN, TAN = "#f4d58d", "#8d5524", "#d4a373"
TEAL, PINK = "#0c8599", "#d6336c"
"""Kernels of others."""

DIRECTIONS = {"forward": BLUE, "forward+backward": ORANGE}
STAGES = (LIGHT_PURPLE, PURPLE, GREEN, SAND, BROWN, TAN)
"""Of stages in the order in which they run; none is the colour of a direction."""
NO_TILE, ALL_TILES = "#ececec", "#06325f"
"""The ends of the scale of tile maps."""

DPI = 150
SMALL: dict[str, Any] = {"fontsize": 8, "color": MUTED}
"""Of notes inside a plot."""


def style() -> dict[Any, Any]:
    """Settings of matplotlib for all pictures."""
    return {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.axisbelow": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }


@contextmanager
def new_figure(
    width: float,
    height: float,
    path: Path | str,
    layout: Literal["constrained"] | None = "constrained",
) -> Iterator[Figure]:
    """An empty figure in the project's style; it is written to ``path`` in the end.

    Args:
        width: inches.
        height: inches.
        path: the PNG to write.
        layout: "constrained", or None where the picture places its panels itself.

    Raises:
        ImportError: without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "plots are drawn by matplotlib, which cannot be imported: "
            f"run pip install '.[demo]' in a clone of {DISTRIBUTION}"
        )
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style()):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
        yield figure
        figure.savefig(path)


def shades() -> Any:
    """A colour map for shares of tiles: from none in grey to all in dark blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tiles", [NO_TILE, LIGHT_BLUE, BLUE, ALL_TILES])


def legend_above(axes: Axes, columns: int = 4) -> None:
    """A legend in one line between the title and the plot."""
    axes.margins(y=0.01)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}
    axes.legend(**place, ncols=columns, columnspacing=1.2)


def title(figure: Figure, text: str) -> None:
    """What a picture shows and where it is from, at its upper left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)
