# SPDX-License-Identifier: Apache-2.0
"""Layers that kernels are measured on, as options write them."""

from __future__ import annotations

import argparse

import typer

from vsa.cli.options import parse_extent
from vsa.values.grid import Extent

LAYERS = ("32x32x32:12", "20x48x80:8")
"""Grids and heads that are measured unless others are asked for."""


def parse_layer(text: str) -> tuple[Extent, int]:
    """A grid and its heads as options write them, such as 32x32x32:12."""
    grid, _, heads = text.partition(":")
    try:
        return parse_extent(grid), int(heads)
    except (ValueError, typer.BadParameter):
        raise argparse.ArgumentTypeError(
            f"a grid and its heads are written as 32x32x32:12, but this is {text!r}"
        ) from None
