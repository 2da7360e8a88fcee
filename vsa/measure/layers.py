# SPDX-License-Identifier: Apache-2.0
"""Layers that the kernels are compared on, as options of the benchmarks write them."""

from __future__ import annotations

import argparse

from vsa.values import checks
from vsa.values.grid import Extent

LAYERS = ("32x32x32:12", "20x48x80:8")
"""Grids and heads that are measured unless others are asked for."""


def parse_layer(text: str) -> tuple[Extent, int]:
    """A grid and its heads as options write them, such as 32x32x32:12.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    grid, _, heads = text.partition(":")
    try:
        return checks.extent("grid", [int(part) for part in grid.split("x")]), int(heads)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"a grid and its heads are written as 32x32x32:12, but this is {text!r}"
        ) from None
