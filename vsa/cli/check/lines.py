# SPDX-License-Identifier: Apache-2.0
"""Rows of a table, printed as they come."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def line(widths: Sequence[int], *cells: str, style: str = "") -> Table:
    """A row of the table by itself, printed as soon as it is known; its last cell may wrap."""
    found = Table(box=None, show_header=False, pad_edge=False, expand=True)
    for width in widths[: len(cells) - 1]:
        found.add_column(width=width, overflow="fold")
    found.add_column(ratio=1, overflow="fold")
    found.add_row(*cells, style=style)
    return found
