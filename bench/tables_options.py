# SPDX-License-Identifier: Apache-2.0
"""Tables of what options of a call cost and gain: scores, tails, low precision, budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tables import Row, markdown


def tail(rows: Sequence[Row]) -> Iterator[str]:
    """Calls without and with a tail."""
    yield markdown(
        ("layer", "gates", "direction", "without, ms", "with a tail, ms", "ratio"),
        (
            [
                row["shape"],
                row["gates"],
                row["direction"],
                f"{row['without ms']:.3f}",
                f"{row['tail ms']:.3f}",
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ),
    )


def sub_blocks(rows: Sequence[Row]) -> Iterator[str]:
    """Errors of scores, and a line for each part with both times."""
    yield markdown(
        ("layer", "runs", "worst error, of its bound", "rows beyond it", "rows that differ"),
        (
            [
                row["shape"],
                str(row["runs"]),
                f"{row['worst error of its bound']:.3f}",
                str(row["rows beyond it"]),
                str(row["rows that differ"]),
            ]
            for row in rows
        ),
    )
    times = (
        [row["shape"], str(row["runs"]), *_part(key), *_both(*value)]
        for row in rows
        for key, value in row.items()
        if key.endswith(", ms")
    )
    yield markdown(("layer", "runs", "part", "way", "mean, ms", "sub-blocks, ms", "ratio"), times)


def _part(key: str) -> list[str]:
    part, way, _ = key.rsplit(", ", 2)
    return [part, way]


def _both(mean: float, runs: float) -> list[str]:
    return [f"{mean:.4f}", f"{runs:.4f}", f"{runs / mean:.2f}"]


def low_precision(rows: Sequence[Row]) -> Iterator[str]:
    """Precisions of the fine stage, and the pass before it."""
    yield markdown(
        (
            *("layer", "d", "lists", "what", "calls"),
            *("ms", "of native", "TFLOP/s", "error", "LSE error"),
        ),
        (
            [
                row["shape"],
                str(row["head_dim"]),
                row["lists"],
                row["what"],
                row.get("calls", "eager"),
                f"{row['ms']:.3f}",
                f"{row['of_native']:.2f}",
                *(
                    "" if row.get(key) is None else f"{row[key]:.{digits}f}"
                    for key, digits in (("tflops", 0), ("error", 4), ("lse_error", 4))
                ),
            ]
            for row in rows
        ),
    )


def recall(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each budget, score and sharing out, with errors and losses beside each other."""
    plain = [row for row in rows if not (row["tail"] or row["gates"])]
    both = [(tail, gates) for gates in (False, True) for tail in (False, True)]
    has = {(row["tail"], row["gates"]) for row in rows}
    both = [pair for pair in both if pair in has]
    lost = [pair for pair in both if any("loss" in row for row in _of(rows, pair))]
    head = ["source", "kept", "score", "heads", "recall", "5th percentile", "least"]
    head += [f"error{_named(pair)}" for pair in both]
    head += [f"loss{_named(pair)}" for pair in lost]
    yield markdown(
        [*head, "attention, ms"], (_recall_cells(row, rows, both, lost) for row in plain)
    )


def _recall_cells(
    row: Row, rows: Sequence[Row], both: Sequence[Any], lost: Sequence[Any]
) -> list[str]:
    names = "source", "topk", "score", "heads"
    same = [each for each in rows if all(each[name] == row[name] for name in names)]
    of_pair = {pair: next(iter(_of(same, pair)), {}) for pair in both}
    ms = row.get("attention_ms")
    return [
        row["source"],
        f"{row['topk']:.1%}",
        row["score"],
        row["heads"],
        *(f"{row[key]:.1%}" for key in ("recall", "recall_p5", "recall_least")),
        *(f"{of_pair[pair]['error']:.3f}" for pair in both),
        *(f"{of_pair[pair]['loss']:.4f}" if "loss" in of_pair[pair] else "" for pair in lost),
        "" if ms is None else f"{ms:.2f}",
    ]


def _of(rows: Sequence[Row], pair: tuple[bool, bool]) -> Iterator[Row]:
    return (row for row in rows if (row["tail"], row["gates"]) == pair)


def _named(pair: tuple[bool, bool]) -> str:
    tail, gates = pair
    return ", tail" * tail + ", gated" * gates
