# SPDX-License-Identifier: Apache-2.0
"""What the stages of ``vsa.attention`` took, as a table."""

from __future__ import annotations

from rich.table import Table

from vsa.measure import stage_hooks

REST = "the rest"


def parts(times: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds of each stage, by the direction it is of; the rest of a direction is the last.

    Args:
        times: of ``vsa.measure.nvtx_ranges.record``, where "forward" and "backward" are the whole
            directions.
    """
    found = {}
    for whole, inner in (("forward", stage_hooks.FORWARD), ("backward", stage_hooks.BACKWARD)):
        if whole in times:
            rows = {stage: times[stage] for stage in inner if stage in times}
            rows[REST] = max(0.0, times[whole] - sum(rows.values()))
            found[whole] = rows
    return found


def stage_table(times: dict[str, float], title: str | None = None) -> Table:
    """A row for each direction and one for each of its stages."""
    table = Table("stage", title=title, title_justify="left")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for whole, rows in parts(times).items():
        table.add_row(f"[bold]{whole}[/bold]", f"{times[whole] * 1e3:,.3f}", "")
        for stage, seconds in rows.items():
            share = f"{seconds / times[whole]:.1%}"
            table.add_row(f"  {stage}", f"{seconds * 1e3:,.3f}", share)
    return table
