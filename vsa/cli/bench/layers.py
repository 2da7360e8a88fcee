# SPDX-License-Identifier: Apache-2.0
"""Which attention layers a command runs: options, and what they mean together."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import typer

import vsa
from vsa.cli import options
from vsa.measure import shapes
from vsa.values.grid import Extent

Sweep = Annotated[
    Literal["length", "density"] | None,
    typer.Option(
        help="8k to 128k tokens (on a CPU 1k to 8k), or shares of key tiles from 1/32 to 1 (at "
        "32,32,32, on a CPU at 8,16,32, unless a shape or grid is given)."
    ),
]
Heads = Annotated[
    int | None, typer.Option(min=1, help="Attention heads; by default the shape's, or 12.")
]
HeadDim = Annotated[
    int | None, typer.Option(min=1, help="Channels of a head; by default the shape's, or 64.")
]


def parse_shape(text: str) -> str:
    """The name of a shape in vsa/measure/shapes.py."""
    try:
        shapes.by_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


SHAPE = typer.Option(
    "--shape",
    parser=parse_shape,
    metavar="NAME",
    help=f"A layer of a model: {', '.join(shapes.SHAPES)}.",
)
GRID = typer.Option(
    "--grid", parser=options.parse_extent, metavar="T,H,W", help="Tokens of the video."
)


def layers(
    names: list[str],
    grids: list[Extent],
    tile: Any,
    heads: int | None,
    head_dim: int | None,
) -> dict[str, shapes.Shape]:
    """Shapes and grids as layers by name, with what was asked for instead of their own."""
    found = {name: shapes.by_name(name) for name in names}
    found |= {
        "x".join(map(str, grid)): shapes.Shape(vsa.Grid(grid), heads=12, head_dim=64)
        for grid in grids
    }
    return {
        name: shapes.Shape(
            replace(each.grid, tile=tile), heads or each.heads, head_dim or each.head_dim
        )
        for name, each in found.items()
    }


def swept(
    sweep: str | None,
    names: list[str],
    grids: list[Extent],
    topk: list[float],
    device: torch.device,
) -> tuple[list[Extent], list[float]]:
    """Grids and shares of a sweep, or the usual ones; those of a CPU take it minutes, not hours.

    Raises:
        typer.BadParameter: if what the sweep brings was given too.
    """
    if sweep == "length" and (names or grids):
        raise typer.BadParameter(
            "--sweep length brings its own grids: leave --shape and --grid out",
            param_hint="--sweep",
        )
    if sweep == "density" and topk:
        raise typer.BadParameter(
            "--sweep density brings its own shares: leave --topk out", param_hint="--sweep"
        )
    if sweep == "length":
        lengths = shapes.CPU_LENGTHS if device.type == "cpu" else shapes.LENGTHS
        grids = [grid.shape for grid in lengths]
    elif not names and not grids:
        of_sweep = (8, 16, 32) if device.type == "cpu" else (32, 32, 32)
        grids = [of_sweep if sweep else (16, 32, 16)]
    return grids, list(shapes.DENSITIES) if sweep == "density" else topk or [0.125]
