# SPDX-License-Identifier: Apache-2.0
"""Draws the masks over tiles of docs/masks.md, each on a small grid.

usage: python bench/draw_masks.py [--out docs/pictures/masks.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vsa
from vsa.diagnostics import theme
from vsa.masks import ChunkCausal, Mask, TeacherForcing, Window
from vsa.values import masks

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "masks.png"
TILE = (3, 4, 4)
PANELS: list[tuple[str, Mask, tuple[int, int, int], tuple[int, int, int]]] = [
    ("ChunkCausal(3)", ChunkCausal(3), (18, 8, 8), (18, 8, 8)),
    (
        "ChunkCausal(3, window=2, sinks=1)",
        ChunkCausal(3, window=2, sinks=1),
        (18, 8, 8),
        (18, 8, 8),
    ),
    (
        "the same, the last chunk over its past",
        ChunkCausal(3, window=2, sinks=1),
        (3, 8, 8),
        (18, 8, 8),
    ),
    ("TeacherForcing(3): clean, then noisy", TeacherForcing(3), (18, 8, 8), (18, 8, 8)),
    ("Window((1, 0, 1))", Window((1, 0, 1)), (18, 8, 8), (18, 8, 8)),
]


def draw(out: Path) -> None:
    """All panels in one picture; rows are query tiles, columns key tiles."""
    heights = [24, 4, 24]
    with theme.new_figure(9.5, 8.6, out) as figure:
        cells = figure.add_gridspec(3, 2, height_ratios=heights)
        places = [cells[0, 0], cells[0, 1], cells[1, :], cells[2, 0], cells[2, 1]]
        for (name, mask, shape, keys), place in zip(PANELS, places, strict=True):
            grid, kv_grid = vsa.Grid(shape, tile=TILE), vsa.Grid(keys, tile=TILE)
            found = masks.resolve(mask, grid, kv_grid, 1)
            assert found is not None
            allowed = found.matrix(grid.num_tiles, None)[0]
            axes = figure.add_subplot(place)
            axes.imshow(allowed, cmap=theme.shades(), vmin=0, vmax=1.6, interpolation="nearest")
            plane = grid.num_tiles // grid.tiles[0]
            for chunk in range(plane, kv_grid.num_tiles, plane):
                axes.axvline(chunk - 0.5, color="white", linewidth=1)
            for chunk in range(plane, grid.num_tiles, plane):
                axes.axhline(chunk - 0.5, color="white", linewidth=1)
            axes.set_xticks([]), axes.set_yticks([])
            axes.set_xlabel("key tiles"), axes.set_ylabel("query tiles")
            share = allowed.float().mean().item()
            axes.set_title(f"{name}: {share:.0%}", fontsize=10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the PNG to write")
    draw(parser.parse_args().out)
