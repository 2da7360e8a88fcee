# SPDX-License-Identifier: Apache-2.0
"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def wide_console(width: int) -> Console:
    """A terminal as it is, or a log of so many columns, where tables are not cut off."""
    found = Console()
    return found if found.is_terminal else Console(width=width)
