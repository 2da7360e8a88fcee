# SPDX-License-Identifier: Apache-2.0
"""What ``vsa train`` prints: a line for each evaluation, tables in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


def line(row: Row) -> str:
    """One evaluation of one kind."""
    parts = [
        f"step {row['step']:>6,}",
        f"{row['kind']:<7}",
        f"held-out loss {row['held_out']:.4f}",
        f"{row['flops']:.2e} FLOPs",
        f"{row['train_ms'] / 1e3:,.1f} s",
    ]
    parts.append(f"recall {fmean(row['recall']):.0%}")
    parts += [
        f"{name.replace('_', ' ')} {fmean(row[name]):.3f}"
        for name in ("gate_coarse", "gate_fine")
        if name in row
    ]
    return "  ".join(parts)


def difference(row: Row, other: Row) -> tuple[float, float]:
    """Mean difference of the held-out loss over the same clips, and its standard error."""
    pairs = zip(row["held_out_clips"], other["held_out_clips"], strict=True)
    differences = [mine - theirs for mine, theirs in pairs]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return fmean(differences), error


def tables(
    rows: Sequence[Row], parameters: Mapping[str, int], baseline: Mapping[str, float]
) -> Iterator[Table]:
    """What each kind reached and cost.

    Args:
        rows: of the run, those of the last step at the end.
        parameters: weights by kind.
        baseline: loss of predicting zero by source.
    """
    last = {row["kind"]: row for row in rows}
    first = next(iter(last.values()))
    table = Table(title="After the last step", title_justify="left", caption_justify="left")
    table.add_column("")
    for kind in last:
        table.add_column(kind, justify="right")

    def add(name: str, cell: Callable[[Row], str]) -> None:
        table.add_row(name, *(cell(row) for row in last.values()))

    def apart(row: Row) -> str:
        return "" if row is first else "{:+.4f} ± {:.4f}".format(*difference(row, first))

    add("weights", lambda row: f"{parameters[row['kind']] / 1e6:,.2f} M")
    add("steps", lambda row: f"{row['step']:,}")
    add("held-out loss", lambda row: f"{row['held_out']:.4f}")
    for source in baseline:
        add(f"  {source} clips", lambda row, of=source: f"{row['held_out_by_source'][of]:.4f}")
    if len(last) > 1:
        add(f"  less that of {first['kind']}", apart)
    add("ms per step", lambda row: f"{row['train_ms'] / max(1, row['step']):,.1f}")
    add("FLOPs per step", lambda row: f"{row['step_flops']:.2e}")
    add("  in attention", lambda row: f"{row['step_flops_attention'] / row['step_flops']:.0%}")
    add("density", lambda row: f"{row['density']:.1%}")
    add("recall", lambda row: f"{fmean(row['recall']):.1%}")
    for name in ("gate_coarse", "gate_fine"):
        if any(name in row for row in last.values()):
            label = f"mean |{name.replace('_', ' ')}|"
            add(label, lambda row, of=name: f"{fmean(row[of]):.3f}" if of in row else "")
    zero = ", ".join(f"{loss:.3f} on {source} clips" for source, loss in baseline.items())
    table.caption = (
        f"Predicting zero has a loss of {zero}. ±: standard error over the held-out clips of one "
        "run; seeds differ more. FLOPs are counted, those of the last step; recall is the share "
        "of dense attention on the tiles that vsa would choose, or that the kind is given."
    )
    yield table
