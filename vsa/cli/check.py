# SPDX-License-Identifier: Apache-2.0
"""``vsa check``: numerical parity of every available backend on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vsa import parity
from vsa.backends import BACKENDS, Request
from vsa.cli.info import describe, devices

ALLOWED = 2.0
"""An error may be this many times that of PyTorch's own attention in the same type."""


@dataclass(frozen=True)
class Row:
    """A backend on a device in a type, or why it cannot run there.

    Attributes:
        backend: its name.
        device: where.
        dtype: None when it cannot run.
        why_not: the reason then.
        gradients: whether the backward is checked too.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype | None
    why_not: str | None = None
    gradients: bool = False


def check() -> None:
    """Hold every backend to the fp64 reference, on problems from whole tiles to single tokens.

    The error of the output and of each gradient is printed as a multiple of the error that
    PyTorch's own attention makes in the same type on the same keys; at most 2 passes. Exit code 1
    if one fails.
    """
    console = Console()
    # Eager FlexAttention is what is wanted of flex on a CPU, and its dense cost is known.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    rows = list(_rows())
    table = Table("backend", "device", "dtype", "problems", "forward", "backward", "verdict")
    failed = False
    with Progress(console=console, transient=True) as progress:
        total = sum(len(_problems(row)) for row in rows)
        task = progress.add_task("checking", total=total)
        for row in rows:
            head = f"[bold]{row.backend}[/bold]", str(row.device)
            if row.dtype is None:
                table.add_row(*head, "", "", "", "", f"cannot run here: {row.why_not}")
                continue
            passed, forward, backward = 0, 0.0, 0.0
            problems = _problems(row)
            for problem in problems:
                ratios = _ratios(problem, row)
                forward = max(forward, ratios["out"])
                backward = max([backward, *(ratios[name] for name in "qkv" if name in ratios)])
                passed += all(ratio <= ALLOWED for ratio in ratios.values())
                progress.advance(task)
            good = passed == len(problems)
            failed |= not good
            table.add_row(
                *head,
                str(row.dtype).removeprefix("torch."),
                f"{passed}/{len(problems)}",
                f"{forward:.2f}x",
                f"{backward:.2f}x" if row.gradients else "no gradients here",
                "[green]exact enough[/green]" if good else "[red]WRONG[/red]",
            )
    console.print(table)
    console.print(
        "Worst error as a multiple of PyTorch's own attention in the same type; 2x passes."
    )
    for device in devices():
        console.print(f"{device}: {describe(device)}")
    raise typer.Exit(code=int(failed))


def _rows() -> Iterator[Row]:
    for device in devices():
        for backend in BACKENDS.values():
            machine = Request(device.type, device.index)
            if (why_not := backend.why_not(machine)) is not None:
                yield Row(backend.name, device, None, why_not)
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                request = replace(machine, dtype=str(dtype), head_dim=64)
                if backend.why_not(request) is None:
                    gradients = backend.why_not(replace(request, gradients=True)) is None
                    yield Row(backend.name, device, dtype, gradients=gradients)


def _problems(row: Row) -> list[parity.Problem]:
    """The list of the test suite, without what PyTorch's attention does not know."""
    if row.dtype is None:
        return []
    head_dim = 16 if row.backend in ("torch", "flex") else 64
    plain = {
        replace(p.without_extras(), name="", topk=p.topk, head_dim=head_dim, dtype=row.dtype)
        for p in parity.PROBLEMS
    }
    # On a GPU FlexAttention is compiled anew for every shape, which takes seconds each.
    every = 5 if row.backend == "flex" and row.device.type == "cuda" else 1
    return sorted(plain, key=repr)[::every]


def _ratios(problem: parity.Problem, row: Row) -> dict[str, float]:
    """Errors as multiples of PyTorch's; NaN, which passes no comparison, stays NaN."""
    if row.backend == "flex":
        torch.compiler.reset()  # else the limit of recompilations is met
    return parity.against_sdpa(problem, row.device, gradients=row.gradients, backend=row.backend)
