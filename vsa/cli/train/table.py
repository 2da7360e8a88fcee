# SPDX-License-Identifier: Apache-2.0
"""What ``vsa train`` prints: a line for each evaluation, tables in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
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


def until(rows: Sequence[Row], loss: float) -> tuple[float, float] | None:
    """FLOPs and seconds of training after which a kind's held-out loss is first so low.

    Between two evaluations all three are taken to follow a straight line.

    Args:
        rows: of one kind, in their order.
        loss: to be reached.

    Returns:
        None if it is not reached.
    """
    for before, after in pairwise(rows):
        if after["held_out"] <= loss < before["held_out"]:
            share = (before["held_out"] - loss) / (before["held_out"] - after["held_out"])
            flops, ms = (
                before[name] + share * (after[name] - before[name])
                for name in ("flops", "train_ms")
            )
            return flops, ms / 1e3
    return None


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
    finals = list(last.values())
    first = finals[0]
    table = Table(title="After the last step", title_justify="left", caption_justify="left")
    table.add_column("")
    for kind in last:
        table.add_column(kind, justify="right")
    table.add_row("weights", *(f"{parameters[kind] / 1e6:,.2f} M" for kind in last))
    table.add_row("steps", *(f"{row['step']:,}" for row in finals))
    table.add_row("held-out loss", *(f"{row['held_out']:.4f}" for row in finals))
    for source in baseline:
        losses = (f"{row['held_out_by_source'][source]:.4f}" for row in finals)
        table.add_row(f"  {source} clips", *losses)
    if len(finals) > 1:
        apart = ("{:+.4f} ± {:.4f}".format(*difference(row, first)) for row in finals[1:])
        table.add_row(f"  less that of {first['kind']}", "", *apart)
        target = max(row["held_out"] for row in finals)
        reached = [until([row for row in rows if row["kind"] == kind], target) for kind in last]
        for place, name in enumerate(("FLOPs", "seconds")):
            cells = ("" if found is None else f"{found[place]:.3g}" for found in reached)
            table.add_row(f"{name} until {target:.4f}", *cells)
    table.add_row("ms per step", *(f"{x['train_ms'] / max(1, x['step']):,.1f}" for x in finals))
    table.add_row("FLOPs per step", *(f"{row['step_flops']:.2e}" for row in finals))
    shares = (row["step_flops_attention"] / row["step_flops"] for row in finals)
    table.add_row("  in attention", *(f"{share:.0%}" for share in shares))
    table.add_row("density", *(f"{row['density']:.1%}" for row in finals))
    table.add_row("recall", *(f"{fmean(row['recall']):.1%}" for row in finals))
    for name in ("gate_coarse", "gate_fine"):
        if any(name in row for row in finals):
            gates = (f"{fmean(row[name]):.3f}" if name in row else "" for row in finals)
            table.add_row(f"mean |{name.replace('_', ' ')}|", *gates)
    zero = ", ".join(f"{loss:.3f} on {source} clips" for source, loss in baseline.items())
    table.caption = (
        f"Predicting zero has a loss of {zero}. ±: standard error over the held-out clips of one "
        "run; seeds differ more. FLOPs are counted, those of the last step; recall is the share "
        "of dense attention on the tiles that vsa would choose, or that the kind is given."
    )
    yield table
