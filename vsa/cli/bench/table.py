# SPDX-License-Identifier: Apache-2.0
"""What ``vsa bench`` prints: a line when a row has been measured, tables of all at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table

from vsa.cli.bench.stage_table import stage_table

if TYPE_CHECKING:
    from vsa.cli.bench.measurement import Measurement

CHOSEN = "chosen"
"""The sparsity pattern that attention chose itself."""


def line(row: Measurement) -> str:
    """A row as it comes."""
    host = f", host {row.host['sparse'] * 1e6:,.0f} µs a call" if row.host else ""
    return (
        f"{row.shape}, {row.kept} of {row.tiles} tiles, {row.direction}: "
        f"dense {row.dense * 1e3:,.1f} ms ±{row.dense_spread:.0%}, "
        f"sparse {row.sparse * 1e3:,.1f} ms ±{row.sparse_spread:.0%}, "
        f"{row.dense / row.sparse:.2f}x{host}"
    )


def tables(measurements: list[Measurement]) -> Iterator[Table]:
    """One for each layer, narrow enough for 80 columns."""
    for layer, group in groupby(measurements, _layer):
        rows = list(group)
        table = Table(title=layer, title_justify="left")
        table.add_column("direction", no_wrap=True)
        for column in ("dense", "sparse", "speed-up", "memory"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row.direction,
                time_and_rate(row.dense, row.dense_spread, row.dense_tflops, row.dense_gpu),
                time_and_rate(row.sparse, row.sparse_spread, row.sparse_tflops, row.sparse_gpu),
                f"[bold]{row.dense / row.sparse:.2f}x[/bold]\n"
                f"{row.sparse_tflops / row.dense_tflops:.0%} rate",
                f"{row.memory / row.inputs:.2f}x\ninputs",
            )
        yield table
        if any(row.host for row in rows):
            yield _ways(rows)
        for row in rows:
            if row.stages:
                yield stage_table(row.stages, title=f"stages, {row.direction}")


def _ways(rows: list[Measurement]) -> Table:
    """What a call costs the host, and its time in a graph and compiled where that was asked for."""
    compared = any(row.ways for row in rows)
    table = Table(title="time of a call, and microseconds that the host needs to issue it")
    table.add_column("direction", no_wrap=True)
    for column in ("dense", "eager", *(("graph", "compiled") if compared else ())):
        table.add_column(column, justify="right")
    for row in rows:
        times = {"dense": row.dense, "sparse": row.sparse} | row.ways
        names = ("dense", "sparse", *(("graph", "compiled") if compared else ()))
        table.add_row(
            row.direction,
            *(
                f"{times[name] * 1e3:,.3f} ms"
                + (f"\n{row.host[name] * 1e6:,.0f} µs" if name in row.host else "")
                for name in names
            ),
        )
    return table


def time_and_rate(seconds: float, spread: float, tflops: float, gpu: dict[str, float]) -> str:
    """A cell: what was measured and, where it is known, what the GPU did meanwhile."""
    lines = [f"{seconds * 1e3:,.1f} ms ±{spread:.0%}", f"{tflops:.3g} TFLOP/s"]
    if gpu:
        lines.append(f"{gpu['clock']:.0f} MHz, {gpu['power']:.0f} W")
    return "\n".join(lines)


def _layer(row: Measurement) -> str:
    text = f" + {row.text}" if row.text else ""
    return (
        f"{math.prod(row.grid):,}{text} tokens = {row.shape}, {row.heads} heads of "
        f"{row.head_dim}, {row.kept} of {row.tiles} tiles kept ({row.kept / row.tiles:.1%})"
        + (f", sparsity pattern {row.pattern}" if row.pattern != CHOSEN else "")
        + (", with a tail" if row.tail else "")
    )
