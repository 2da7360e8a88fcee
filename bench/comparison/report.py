# SPDX-License-Identifier: Apache-2.0
"""Rows of all kernels as shares of dense attention, as lines and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from comparison.worker import KERNELS

Row = dict[str, Any]
BASELINES = ("fa3", "cudnn")
"""The dense kernel that shares are of: the first that was measured for that layer."""


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``baseline``, ``share`` of its TFLOP/s and ``speedup`` over its time.

    Only where a dense kernel was measured for the layer.
    """
    dense = {
        (row["kernel"], *layer(row)): row for row in rows if row.get("dense") and "tflops" in row
    }
    found = []
    for row in rows:
        added: Row = {}
        names = [x for x in BASELINES if "tflops" in row and (x, *layer(row)) in dense]
        if names:
            at = names[0], *layer(row)
            baseline = dense[at]
            added = {
                "baseline": names[0],
                "share": row["tflops"] / baseline["tflops"],
                "speedup": baseline["ms"] / row["ms"],
            }
        found.append(row | added)
    return found


def layer(row: Row) -> tuple[Any, ...]:
    """What rows that are compared have in common, the pattern aside."""
    return tuple(row["grid"]), row["heads"], row["head_dim"], row["direction"]


def line(row: Row) -> str:
    """A row in one line, as it comes."""
    title = KERNELS[row["kernel"]].title
    about = title
    if "grid" in row:
        grid = "x".join(map(str, row["grid"]))
        about = f"{title}, {grid}, d {row['head_dim']}, {row['pattern'] or 'dense'}"
    if "direction" in row:
        about += f", {row['direction']}"
    if reason := row.get("skipped"):
        return f"{about}: skipped, {reason}"
    if reason := row.get("failed"):
        return f"{about}: failed, {reason}"
    planned = f", planned in {row['plan_ms']:.3g} ms" if "plan_ms" in row else ""
    return f"{about}: {row['ms']:.3f} ms ±{row['spread']:.1%}, {row['tflops']:.3g} TFLOP/s{planned}"


def inconsistent(rows: Sequence[Row]) -> list[str]:
    """Cases in which kernels did not have the same pattern and inputs; there should be none."""
    seen: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        if "inputs" in row and not row["dense"]:
            seen.setdefault((*layer(row)[:3], row["pattern"]), set()).add(row["inputs"])
    return [str(case) for case, prints in seen.items() if len(prints) > 1]


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One per layer and direction, the patterns inside it."""
    measured = [row for row in rows if "tflops" in row]
    for key in dict.fromkeys(layer(row) for row in measured):
        mine = [row for row in measured if layer(row) == key]
        grid, heads, head_dim, direction = key
        name = "x".join(map(str, grid))
        table = Table(
            title=f"{direction}: {name}, {heads} heads of {head_dim}", title_justify="left"
        )
        table.add_column("pattern (shared)")
        table.add_column("kernel")
        for column in ("ms", "TFLOP/s", "share", "speed-up", "MHz", "W", "worst error"):
            table.add_column(column, justify="right")
        for row in sorted(mine, key=lambda row: (row["pattern"] or "", -row["tflops"])):
            table.add_row(*cells(row))
        yield table


def cells(row: Row) -> list[str]:
    """A row of the table."""
    shared = f"{row['pattern']} ({row['shared']:.0%})" if row["pattern"] else "dense"
    gpu = row["gpu"]
    worst = max(row["errors"], key=row["errors"].__getitem__)
    return [
        shared,
        KERNELS[row["kernel"]].title,
        f"{row['ms']:.3f} ±{row['spread']:.1%}",
        f"{row['tflops']:.3g}",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{row['speedup']:.2f}x" if "speedup" in row else "",
        f"{gpu['clock']:.0f}" if gpu else "",
        f"{gpu['power']:.0f}" if gpu else "",
        f"{worst} {row['errors'][worst]:.1e}",
    ]
