# SPDX-License-Identifier: Apache-2.0
"""Tables whose columns are the keys of their rows, for benchmarks that write them to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tables import Row, markdown

DIGITS = 4
"""Of a number that is no whole one."""


def plain(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each run of rows with the same keys; what is nested stays in the file."""
    group: list[Row] = []
    for row in [*rows, {}]:
        if group and list(_shown(group[0])) != list(_shown(row)):
            head = list(_shown(group[0]))
            yield markdown(head, ([_text(each[key]) for key in head] for each in group))
            group = []
        group.append(row)


def _shown(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if isinstance(value, (str, int, float))}


def _text(value: Any) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
