# SPDX-License-Identifier: Apache-2.0
"""``vsa check`` of int8 and fp8: against fp64, and kernels against their simulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from vsa.backends import BACKENDS, Request
from vsa.cli.check.lines import line
from vsa.cli.info import devices
from vsa.values.precision import HEAD_DIMS, PRECISIONS, Precision
from vsa.verify import low_precision

COLUMNS = "backend", "device", "precision", "problems", "output", "lse, simulation", "verdict"
WIDTHS = 8, 7, 9, 8, 8, 17
BESIDE_A_GPU = ("text", "longer")
"""Of what is emulated or simulated where a GPU runs the kernels."""
ALSO_AT_128 = ("ragged", "text", "longer", "offsets", "sharp")
"""In fp16: kernels of their own."""


class Row(NamedTuple):
    """A backend on a device in a precision.

    Attributes:
        backend: its name.
        device: where.
        precision: "int8" or "fp8".
        beside_a_gpu: whether a GPU of this machine runs the kernels.
    """

    backend: str
    device: torch.device
    precision: Precision
    beside_a_gpu: bool


def rows() -> Iterator[Row]:
    """All that can run here."""

    def runs(name: str, device: torch.device, precision: Precision) -> bool:
        request = Request(
            device.type, device.index, str(torch.bfloat16), HEAD_DIMS[0], False, precision
        )
        return BACKENDS[name].why_not(request) is None

    gpu = any(runs("hopper", device, "int8") for device in devices())
    for device in devices():
        for name in BACKENDS:
            for precision in PRECISIONS[1:]:
                if runs(name, device, precision):
                    yield Row(name, device, precision, gpu and name != "hopper")


def cases(row: Row) -> list[low_precision.Case]:
    """What a row is held to."""
    found = low_precision.CASES
    if row.beside_a_gpu:
        return [case for case in found if case.name in BESIDE_A_GPU]
    wide = [low_precision.changed(case, head_dim=128, dtype=torch.float16) for case in found]
    return [*found, *(case for case in wide if case.name in ALSO_AT_128)]


def check_low_precision(console: Console) -> bool:
    """Print a line for each row as it comes; whether all are right."""
    good = True
    work = [(row, cases(row)) for row in rows()]
    console.print(line(WIDTHS, *COLUMNS, style="bold"))
    with Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=sum(len(each) for _, each in work))
        for row, each in work:
            found = []
            for case in each:
                about = f"{row.backend} on {row.device}, {row.precision}: {case.name}"
                progress.update(task, description=about)
                found.append(_shares(case, row))
                progress.advance(task)
            right, *cells = judged(found)
            good &= right
            console.print(line(WIDTHS, row.backend, str(row.device), row.precision, *cells))
    console.print("Worst error as a share of what int8 and fp8 may be off by; 1x passes.")
    return good


def _shares(case: low_precision.Case, row: Row) -> dict[str, float]:
    return low_precision.shares(case, row.precision, row.device, backend=row.backend)


def judged(found: list[dict[str, float]]) -> tuple[bool, str, str, str, str]:
    """Whether all of a row's problems pass, and its cells."""
    passed = sum(all(share <= 1 for share in shares.values()) for shares in found)
    good = passed == len(found)

    def worst(*names: str) -> str:
        some = [shares[name] for shares in found for name in names if name in shares]
        if not some:
            return "its own"
        return f"{max(some, key=lambda x: math.inf if math.isnan(x) else x):.2f}x"

    return (
        good,
        f"{passed}/{len(found)}",
        worst("selection", "nothing", "out"),
        f"{worst('lse')}, {worst('simulation')}",
        "[green]exact enough[/green]" if good else "[red]WRONG[/red]",
    )
