# SPDX-License-Identifier: Apache-2.0
"""What a record shows, as one picture or as a page that needs nothing else."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vsa.diagnostics.plots import add_scale, outline
from vsa.diagnostics.theme import FAINT, INK, MUTED, new_figure, shades
from vsa.values.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_MAP_STEPS = 3
"""Steps whose tile maps are drawn, spread over those noted."""
WIDTH, MAPS_WIDTH = 12.0, 10.4
"""Inches: of the picture, and of tile maps, with room for their scale."""
LEAST_CELL, MOST_CELL = 0.15, 0.26
"""Inches that a tile takes: where tile maps stand side by side at least, and at most."""

APART = 0.12
"""Between tile maps that stand side by side, as a share of their width."""

STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 75rem; margin: 2rem auto;
       padding: 0 1rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ text-align: right; padding: 0.2rem 1rem; border-bottom: 1px solid {FAINT}; }}
th {{ color: {MUTED}; font-weight: normal; }}
"""


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What sparse attention kept</title>
<style>{style}</style>
<h1>What sparse attention kept</h1>
<p>A video of {video}; {layers} layers; {steps}. Recall is the share of dense attention to the video
that lies on the kept tiles, measured for at most {tiles} query tiles of every layer.</p>
<img alt="Recall and density by layer and step, and tile maps"
     src="data:image/png;base64,{picture}">
<table>
<tr><th>layer</th><th>key tiles kept</th><th>recall</th><th>lowest of a step</th>
<th>lowest of a head</th></tr>
{table}
</table>
</html>
"""


class Recorded(Protocol):
    """What a report is written from: a ``vsa.diagnostics.record.Record``."""

    layers: int
    every: int
    tiles: int
    maps: Sequence[int]
    grid: Grid | None

    @property
    def query(self) -> int:
        """Number of the query tile whose map is kept."""

    @property
    def steps(self) -> list[int]:
        """Steps that were noted."""

    @property
    def density(self) -> Tensor:
        """Share of tiles kept, (layers, steps, heads)."""

    @property
    def recall(self) -> Tensor:
        """Share of dense attention kept, (layers, steps, heads)."""

    def tile_map(self, layer: int, step: int) -> Tensor | None:
        """Shares of the heads that keep each tile, (nt, nh, nw)."""


def write(record: Recorded, path: Path) -> None:
    """Write a report of a record; see ``Record.report``."""
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"path must end in .html or .png, but it is {path}")
    density, recall = record.density, record.recall  # these raise where nothing was noted
    if path.suffix == ".png":
        _draw(record, density, recall, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        _draw(record, density, recall, picture)
        data = base64.b64encode(picture.read_bytes()).decode()
    path.write_text(_page(record, density, recall, data))


def _draw(record: Recorded, density: Tensor, recall: Tensor, path: Path) -> None:
    """Heat maps of layer against step above, tile maps of some layers and steps below."""
    maps = _maps(record)
    nt, nh, nw = record.grid.tiles if record.grid else (1, 1, 1)
    across = nt * (nw + 1) * (1 + APART)
    steps = len({step for _, step in maps})
    columns = steps if steps * across * LEAST_CELL <= MAPS_WIDTH else 1
    cell = min(MOST_CELL, MAPS_WIDTH / max(1, columns * across))
    lines = math.ceil(len(maps) / max(1, columns))
    heights = [min(7.0, max(2.4, 0.16 * record.layers + 1.0)), lines * (nh * cell + 0.4) + 0.6]
    with new_figure(WIDTH, sum(heights) if maps else heights[0], path) as figure:
        rows = 1 + bool(maps)
        parts = figure.subfigures(rows, 1, height_ratios=heights[:rows], squeeze=False)
        top, *below = parts[:, 0]
        left, right = top.subplots(1, 2)
        _heat_map(left, record, recall, "Share of dense attention on the kept tiles (recall)", 1.0)
        most = float(density.nan_to_num(0).mean(-1).max())
        _heat_map(right, record, density, "Share of key tiles kept (density)", most)
        for part in below:
            _draw_maps(part, record, maps, lines, columns)


def _draw_maps(
    part: Any, record: Recorded, maps: dict[tuple[int, int], Tensor], lines: int, columns: int
) -> None:
    apart = {"wspace": APART}
    panels = part.subplots(lines, columns, squeeze=False, gridspec_kw=apart).flatten()
    for unused in panels[len(maps) :]:
        unused.set_axis_off()
    for axes, ((layer, step), shares) in zip(panels, maps.items(), strict=False):
        image = _strip(axes, record, shares)
        name = f"layer {layer}, step {step}"
        axes.set_title(name, fontsize=9, fontweight="normal", color=MUTED, pad=3)
    part.suptitle(
        "Key tiles that the middle query tile (orange) keeps, along t from left to right",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    add_scale(part, image, list(panels), ("no head", "half", "all heads"))


def _heat_map(axes: Axes, record: Recorded, values: Tensor, title: str, most: float) -> None:
    """Values (layers, steps, heads), heads averaged; what stayed dense is left white."""
    shares = values.mean(-1)
    image = axes.imshow(
        shares.numpy(), cmap=shades(), vmin=0, vmax=most, aspect="auto", interpolation="nearest"
    )
    steps = record.steps
    ticks = range(0, len(steps), math.ceil(len(steps) / 10))
    axes.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
    axes.set_yticks(range(0, record.layers, math.ceil(record.layers / 10)))
    axes.set(xlabel="denoising step", ylabel="layer")
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if shares.isnan().any():
        axes.set_xlabel("denoising step (white: dense)")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_ticks([0, most / 2, most], labels=[_percent(x) for x in (0, most / 2, most)])
    bar.outline.set_visible(False)


def _strip(axes: Axes, record: Recorded, shares: Tensor) -> Any:
    """Layers of tiles along t side by side, a column apart."""
    nt, nh, nw = shares.shape
    apart = torch.full((nt, nh, 1), float("nan"))
    wide = torch.cat((shares, apart), dim=2).transpose(0, 1).reshape(nh, nt * (nw + 1))
    image = axes.pcolormesh(wide.numpy(), cmap=shades(), vmin=0, vmax=1, edgecolor="w")
    axes.set(aspect="equal", xlim=(0, nt * (nw + 1) - 1), ylim=(nh, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_anchor("W")
    t, h, w = record.query // (nh * nw), record.query // nw % nh, record.query % nw
    outline(axes, (t, h, t * (nw + 1) + w))
    return image


def _maps(record: Recorded) -> dict[tuple[int, int], Tensor]:
    """By layer and step: for a few steps, all layers that have a map."""
    layers = sorted(record.maps)
    found = {
        (layer, step): shares
        for step in record.steps
        for layer in layers
        if (shares := record.tile_map(layer, step)) is not None
    }
    steps = sorted({step for _, step in found})
    places = torch.linspace(0, len(steps) - 1, min(MOST_MAP_STEPS, len(steps)))
    chosen = {steps[int(place)] for place in places}
    return {place: found[place] for place in sorted(found) if place[1] in chosen}


def _page(record: Recorded, density: Tensor, recall: Tensor, picture: str) -> str:
    grid = record.grid
    assert grid is not None
    rows = [
        ("all", density, recall),
        *((str(n), density[n], recall[n]) for n in range(record.layers)),
    ]
    table = "\n".join(_row(*row) for row in rows)
    video, tile = ("x".join(map(str, sizes)) for sizes in (grid.shape, grid.box))
    return PAGE.format(
        style=STYLE,
        video=f"{video} tokens in {grid.num_tiles} tiles of {tile}",
        layers=record.layers,
        steps=f"{len(record.steps)} steps noted, one in {record.every}",
        tiles=record.tiles,
        picture=picture,
        table=table,
    )


def _row(name: str, density: Tensor, recall: Tensor) -> str:
    """Mean density and recall, and the lowest recall of a step and of a head; NaN where dense."""
    steps, heads = recall.nanmean(-1).flatten(), recall.flatten(0, -2).nanmean(0)
    lowest = [x.nan_to_num(math.inf).min() for x in (steps, heads)]
    shares = [float(x) for x in (density.nanmean(), recall.nanmean(), *lowest)]
    return f"<tr><td>{name}</td>{''.join(f'<td>{_percent(x)}</td>' for x in shares)}</tr>"


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "dense"
