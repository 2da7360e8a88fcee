# SPDX-License-Identifier: Apache-2.0
"""How many tiles of a block share a load, by sparsity pattern and by the axis of the neighbours.

usage: python bench/reuse.py [--captured captured.pt] [--layers 32x32x32:12 20x48x80:8]

A block of the forward and of the dQ pass takes three query tiles, one of the dK dV pass two key
tiles; each head takes them along w or along t. Printed is how many of them want a tile that any of
them wants: along w, along t, along the axis that the kernels choose, and along each head's better
one. Nothing is timed, so a CPU does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

import vsa
from vsa.measure import patterns
from vsa.measure.console import wide_console
from vsa.measure.layers import LAYERS, parse_layer
from vsa.values import checks

QUERY_TILES, KEY_TILES = 3, 2
"""That share loads in a block of the forward and dQ passes, and in one of the dK dV pass."""
LOG_WIDTH = 120


def turned(selection: vsa.Selection) -> vsa.Selection:
    """Which query tiles attend each key tile: the selection as the dK dV pass reads it."""
    return vsa.Selection.from_mask(selection.mask().mT, selection.kv_grid, selection.grid)


def better_axes(selection: vsa.Selection, tiles: int) -> Tensor:
    """The axis along which each head shares more, (B, heads): 0 for w, 1 for t."""
    found = torch.zeros(selection.shape[:2], dtype=torch.int32)
    for head in range(selection.shape[1]):
        mask = selection.mask()[:, head, None]
        one = vsa.Selection.from_mask(mask, selection.grid, selection.kv_grid)
        along_w, along_t = (patterns.reuse(one, tiles, _all(one, axis)) for axis in (0, 1))
        found[:, head] = int(along_t > along_w)
    return found


def _all(selection: vsa.Selection, axis: int) -> Tensor:
    return torch.full(selection.shape[:2], axis, dtype=torch.int32)


def reuses(selection: vsa.Selection, tiles: int) -> list[float]:
    """Along w, along t, along the axes that are chosen, along each head's better one."""
    axes = (
        _all(selection, 0),
        _all(selection, 1),
        patterns.chosen_axes(selection).cpu(),
        better_axes(selection, tiles),
    )
    return [patterns.reuse(selection, tiles, each) for each in axes]


def main() -> None:
    """Print a row for each pattern and layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captured", type=Path, metavar="FILE", help="made by bench/captured.py")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=parse_layer,
        default=[parse_layer(text) for text in LAYERS],
        metavar="TxHxW:HEADS",
    )
    parser.add_argument("--topk", type=float, default=0.125, help="share of the key tiles kept")
    options = parser.parse_args()
    table = Table("pattern, layer")
    table.title = f"Of {QUERY_TILES} query tiles, then of {KEY_TILES} key tiles"
    for axis in ("w", "t", "chosen", "better") * 2:
        table.add_column(axis, justify="right")
    kinds = [x for x in patterns.KINDS if x != "captured" or options.captured]
    for kind in kinds:
        for extent, heads in options.layers:
            grid = vsa.Grid(extent)
            topk = checks.top_k(options.topk, grid.num_tiles)
            selection = patterns.selection(
                kind, grid, heads, topk, torch.device("cpu"), options.captured
            )
            cells = [*reuses(selection, QUERY_TILES), *reuses(turned(selection), KEY_TILES)]
            name = f"{kind}, {patterns.layer_name(grid)}"
            table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    wide_console(LOG_WIDTH).print(table)


if __name__ == "__main__":
    main()
