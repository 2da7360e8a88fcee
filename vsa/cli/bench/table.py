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
    native, called, of_native = "", "sparse", ""
    if row.native is not None:
        native = f"native {row.native.seconds * 1e3:,.1f} ms ±{row.native.spread:.0%}, "
        called = row.precision
        of_native = (
            f" dense and {row.native.seconds / row.sparse:.2f}x native, relative error "
            f"{row.errors['out']:.4f} for {row.native.errors['out']:.4f}"
        )
    host = f", host {row.host['sparse'] * 1e6:,.0f} µs a call" if row.host else ""
    return (
        f"{row.shape}, {row.kept} of {row.tiles} tiles, {row.direction}: "
        f"dense {row.dense * 1e3:,.1f} ms ±{row.dense_spread:.0%}, "
        f"{native}{called} {row.sparse * 1e3:,.1f} ms ±{row.sparse_spread:.0%}, "
        f"{row.dense / row.sparse:.2f}x{of_native}{host}"
    )


def tables(measurements: list[Measurement]) -> Iterator[Table]:
    """One for each layer, narrow enough for 80 columns."""
    for layer, group in groupby(measurements, _layer):
        rows = list(group)
        table = Table(title=layer, title_justify="left")
        table.add_column("direction", no_wrap=True)
        low = rows[0].precision if rows[0].native is not None else None
        kinds = ("sparse",) if low is None else ("native", low)
        for column in ("dense", *kinds, "speed-up", "memory"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row.direction,
                time_and_rate(row.dense, row.dense_spread, row.dense_tflops, row.dense_gpu),
                *_native_cell(row),
                _own_cell(row),
                _gains(row),
                f"{row.memory / row.inputs:.2f}x\ninputs",
            )
        yield table
        if any(row.host for row in rows):
            yield _ways(rows)
        for row in rows:
            if row.stages:
                yield stage_table(row.stages, title=f"stages, {row.direction}")


def _native_cell(row: Measurement) -> Iterator[str]:
    """Native precision beside another one, if there is another."""
    if (native := row.native) is not None:
        cell = time_and_rate(native.seconds, native.spread, row.native_tflops, native.gpu)
        yield f"{cell}\nerror {native.errors['out']:.4f}"


def _gains(row: Measurement) -> str:
    """How much faster than what stands beside it, and the share of the dense rate."""
    lines = [f"[bold]{row.dense / row.sparse:.2f}x[/bold]"]
    lines.append(f"{row.sparse_tflops / row.dense_tflops:.0%} rate")
    if row.native is not None:
        lines.append(f"{row.native.seconds / row.sparse:.2f}x native")
    return "\n".join(lines)


def _own_cell(row: Measurement) -> str:
    """The precision that was asked for; its error where native stands beside."""
    cell = time_and_rate(row.sparse, row.sparse_spread, row.sparse_tflops, row.sparse_gpu)
    return cell if row.native is None else f"{cell}\nerror {row.errors['out']:.4f}"


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
