# SPDX-License-Identifier: Apache-2.0
"""Tables of clocks between marks in a kernel, out of the rows of bench/work_tile_clocks.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tables import Row, markdown
from work_tile_marks import CONSUMER, LAUNCH, SCHEDULER


def work_tile_clocks(rows: Sequence[Row]) -> Iterator[str]:
    """Times and consumers, then the scheduler's first chunk."""
    yield "Clocks of a consumer until its first queries are there, and those of its work tile:"
    head = (
        "lists",
        "ms",
        "with marks, ms",
        "TFLOP/s",
        LAUNCH,
        *CONSUMER,
        "loop, a tile of the block",
    )
    yield markdown(
        head,
        (
            [
                *(_lists(row), _times(row["unmarked_ms"]), _times(row["marked_ms"])),
                f"{row['tflops']:.0f}",
                *_clocks(row, LAUNCH, *CONSUMER),
                f"{row['clocks']['main loop'] / row['consumers'] / row['topk']:,.0f}",
            ]
            for row in rows
        ),
    )
    yield "Clocks of a block's scheduler until its first chunk is written:"
    yield markdown(
        ("lists", *SCHEDULER, "all"),
        (
            [
                *(_lists(row), *_clocks(row, *SCHEDULER)),
                f"{sum(row['clocks'][part] for part in SCHEDULER):,.0f}",
            ]
            for row in rows
        ),
    )


def _lists(row: Row) -> str:
    layer = "x".join(map(str, row["grid"]))
    return f"{row['pattern']}, {layer}, {row['heads']} heads, d {row['head_dim']}, {row['topk']}"


def _times(found: Sequence[float]) -> str:
    return ", ".join(f"{ms:.4f}" for ms in found)


def _clocks(row: Row, *parts: str) -> list[str]:
    return [f"{row['clocks'][part]:,.0f}" for part in parts]
