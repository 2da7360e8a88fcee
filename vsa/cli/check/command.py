# SPDX-License-Identifier: Apache-2.0
"""``vsa check``: numerical parity of every available backend on this machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from vsa.backends import BACKENDS, Request
from vsa.cli import options
from vsa.cli.check.layer import check_layers
from vsa.cli.check.lines import line
from vsa.cli.check.low_precision import check_low_precision
from vsa.cli.info import describe, devices
from vsa.cli.outputs import check_output
from vsa.measure.shapes import GRIDS
from vsa.verify import parity


def parse_shape(text: str) -> str:
    """The name of a grid in vsa/measure/shapes.py."""
    if text not in GRIDS:
        raise typer.BadParameter(f"shape must be one of {', '.join(GRIDS)}, but it is {text!r}")
    return text


SHAPE = typer.Option(
    "--shape",
    parser=parse_shape,
    metavar="NAME",
    help=f"The token grid of a model: {', '.join(GRIDS)}.",
)
ALLOWED = 2.0
"""An error may be this many times that of PyTorch's own attention in the same type."""
FORWARD = ("selection", "out", "trained")
"""Ratios that are not of gradients."""
COLUMNS = "backend", "device", "dtype", "problems", "forward", "backward", "verdict"
WIDTHS = 8, 7, 8, 8, 8, 17
"""Of all columns but the last, which takes what is left."""
FLEX_PROBLEMS = {
    "cpu": ("ragged", "gates", "grouped-query", "mass", "text", "other-keys"),
    "cuda": ("text",),
}
"""FlexAttention is compiled anew for every shape, which takes seconds each on a GPU."""
BESIDE_A_GPU = ("text",)
"""What the emulator and FlexAttention on a CPU are held to where a GPU runs the kernels: it is the
one that matters, and all of this should take half a minute."""
ALSO_AT_128 = ("ragged", "grouped-query", "gates", "text", "chunk-causal")


@dataclass(frozen=True)
class Row:
    """A backend on a device in a type, or why it cannot run there.

    Attributes:
        backend: its name.
        device: where.
        dtype: None when it cannot run.
        why_not: the reason then.
        gradients: whether the backward is checked too.
        beside_a_gpu: whether a GPU of this machine runs what is emulated here.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype | None
    why_not: str | None = None
    gradients: bool = False
    beside_a_gpu: bool = False

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}, {self.dtype}".replace("torch.", "")


OF_SHAPE = ("head_dim", "small", "tiles", "device", "backend", "forward_only", "json_file")
"""Parameters that mean something with --shape alone."""


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check(
    context: typer.Context,
    shape: Annotated[list[str], SHAPE] = [],  # noqa: B006  typer copies it
    head_dim: Annotated[
        list[int],
        typer.Option("--head-dim", help="Of --shape: channels of a head; by default its own."),
    ] = [],  # noqa: B006
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="Of --shape: about a quarter along each axis, with the same remainders."
        ),
    ] = False,
    tiles: Annotated[int, typer.Option(min=1, help="Of --shape: query tiles compared.")] = 24,
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Of --shape: leave the backward out.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Of --shape: write all figures to a .json file.")
    ] = None,
) -> None:
    """Hold every backend to fp64 results, on problems from whole tiles to single tokens.

    Text, gates, grouped heads, masks and the choice of tiles are part of them. The error of the
    output and of each gradient is printed as a multiple of the error that PyTorch's own attention
    makes in the same type; at most 2 passes. Errors of int8 and fp8, against fp64 and their
    simulation, are printed as shares of what they may be. Exit code 1 if one fails.

    --shape checks one backend on the token grid of a model instead, with two heads, in bf16 and
    fp16, on sampled tiles; it may be given several times. A GPU takes seconds for each; a CPU
    takes minutes, and less with --small.
    """
    if shape:
        check_output(json_file, ".json", "--json")
        good = check_layers(
            shape, head_dim, device, backend, tiles, small, not forward_only, json_file
        )
        raise typer.Exit(code=int(not good))
    given = [name for name in OF_SHAPE if _is_given(context, name)]
    if given:
        names = [f"--{name.removesuffix('_file').replace('_', '-')}" for name in given]
        raise typer.BadParameter(
            f"{', '.join(names)} must stand with --shape: without it every backend is checked on "
            "all devices",
            param_hint=names,
        )
    console = Console()
    # Eager FlexAttention is what is wanted of flex on a CPU, and its dense cost is known.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    rows = [(row, _problems(row)) for row in _rows()]
    console.print(_line(*COLUMNS, style="bold"))
    failed = False
    with _one_thread(), Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=sum(len(problems) for _, problems in rows))
        for row, problems in rows:
            good = True
            if row.dtype is None:
                cells = [f"cannot run here: {row.why_not}"]
            else:
                found = []
                for problem in problems:
                    progress.update(task, description=f"{row}: {problem.name}")
                    found.append(_ratios(problem, row))
                    progress.advance(task)
                good, *cells = _judged(row, found)
            failed |= not good
            console.print(_line(row.backend, str(row.device), *cells))
    console.print(
        "Worst error as a multiple of PyTorch's own attention in the same type; 2x passes."
    )
    with _one_thread():
        failed |= not check_low_precision(console)
    for device in devices():
        console.print(f"{device}: {describe(device)}")
    raise typer.Exit(code=int(failed))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The problems are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _line(*cells: str, style: str = "") -> Table:
    """A row of the table; its last cell may wrap."""
    return line(WIDTHS, *cells, style=style)


def _judged(row: Row, found: list[dict[str, float]]) -> tuple[bool, str, str, str, str, str]:
    """Whether all of a row's problems pass, and its cells."""
    passed = sum(all(ratio <= ALLOWED for ratio in ratios.values()) for ratios in found)
    forward, backward = (
        _worst([r for ratios in found for name, r in ratios.items() if (name in FORWARD) == which])
        for which in (True, False)
    )
    good = passed == len(found)
    return (
        good,
        str(row.dtype).removeprefix("torch."),
        f"{passed}/{len(found)}",
        f"{forward:.2f}x",
        f"{backward:.2f}x" if row.gradients else "no gradients here",
        "[green]exact enough[/green]" if good else "[red]WRONG[/red]",
    )


def _worst(ratios: list[float]) -> float:
    """The largest; NaN, which compares with nothing, is worse than all."""
    return max(ratios, key=lambda ratio: math.inf if math.isnan(ratio) else ratio, default=0.0)


def _rows() -> Iterator[Row]:
    gpu = any(
        BACKENDS["hopper"].why_not(Request(device.type, device.index)) is None
        for device in devices()
    )
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
                    beside = gpu and device.type == "cpu" and backend.name != "torch"
                    yield Row(backend.name, device, dtype, None, gradients, beside)


def _problems(row: Row) -> list[parity.Problem]:
    """The list of the test suite, in the row's type and a head_dim that all backends take."""
    if row.dtype is None:
        return []
    problems = [replace(problem, head_dim=64, dtype=row.dtype) for problem in parity.CHECKED]
    if row.backend == "flex" or row.beside_a_gpu:
        names = BESIDE_A_GPU if row.beside_a_gpu else FLEX_PROBLEMS[row.device.type]
        return [problem for problem in problems if problem.name in names]
    if row.backend != "torch":  # kernels of their own for each head_dim
        problems += [replace(p, head_dim=128) for p in problems if p.name in ALSO_AT_128]
    return problems


def _ratios(problem: parity.Problem, row: Row) -> dict[str, float]:
    """Errors as multiples of PyTorch's; NaN, which passes no comparison, stays NaN."""
    if row.backend == "flex":
        torch.compiler.reset()  # else the limit of recompilations is met
    return parity.relative_to_sdpa(
        problem, row.device, gradients=row.gradients, backend=row.backend
    )
