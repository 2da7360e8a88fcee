# SPDX-License-Identifier: Apache-2.0
"""``vsa profile``: a run whose stages have names for Nsight, and what a report of it says."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vsa
from vsa.cli import options
from vsa.cli.bench import layers as layers
from vsa.cli.bench.stage_table import stage_table
from vsa.cli.profile import ncu_report as ncu_report
from vsa.measure import stage_hooks
from vsa.measure.console import wide_console
from vsa.measure.machine import machine
from vsa.measure.nvtx_ranges import record
from vsa.measure.shapes import Shape

DEFAULT_SHAPE = "wan-1.3b-480p"
MOST_STALLS = 3
LOG_WIDTH = 160
"""Columns of a report that goes to no terminal."""


def profile(
    shape: Annotated[str | None, layers.SHAPE] = None,
    grid: Annotated[Any, layers.GRID] = None,
    heads: layers.Heads = None,
    head_dim: layers.HeadDim = None,
    topk: options.Topk = "0.125",
    tile: options.TileShape = "4,4,4",
    dtype: Annotated[
        torch.dtype | None,
        typer.Option(
            "--dtype",
            parser=options.parse_dtype,
            metavar="DTYPE",
            help=f"{options.DTYPE_HELP} By default bf16 on a GPU and fp32 on a CPU.",
        ),
    ] = None,
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    backward: Annotated[bool, typer.Option("--backward", help="Run the backward too.")] = False,
    gates: Annotated[bool, typer.Option(help="With the coarse output and both gates.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Calls under the profiler.")] = 5,
    report: Annotated[
        Path | None,
        typer.Option(
            "--read",
            exists=True,
            dir_okay=False,
            help="Run nothing: read a report of this layer by ncu --csv --page raw.",
        ),
    ] = None,
) -> None:
    """Run vsa.attention with a named range per stage, and print where its time went.

    On a GPU the ranges are NVTX's, and the command lines for nsys and ncu are printed; on a CPU
    they are PyTorch's profiler's. Inputs are random; the default is --shape wan-1.3b-480p. --read
    makes a table of an ncu report.
    """
    if shape and grid:
        raise typer.BadParameter("a layer has a shape or a grid, not both", param_hint="--grid")
    shape = shape or DEFAULT_SHAPE
    ((called, layer),) = layers.layers(
        [] if grid else [shape], [grid] if grid else [], tile, heads, head_dim
    ).items()
    if report is not None:
        _show_report(report, layer, topk)
        return
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = options.check_backend(backend, device, dtype, layer.head_dim, gradients=backward)
    workload = _workload(layer, topk, device, dtype, name, backward, gates)
    times = record(workload, device, repeats)
    console = Console()
    console.print(stage_table(times))
    console.print(
        f"{called}: {layer.grid.length:,} tokens, {layer.heads} heads of {layer.head_dim}, "
        f"topk {topk}, {str(dtype).removeprefix('torch.')}, backend {name}, "
        f"{machine(device)}; mean of {repeats}"
    )
    where = ["--grid", ",".join(map(str, grid))] if grid else ["--shape", shape]
    what = [*where, "--heads", layer.heads, "--head-dim", layer.head_dim, "--topk", topk]
    what += ["--tile", ",".join(map(str, layer.grid.tile))]
    run = ["--device", "cuda"] + ["--backward"] * backward + ["--no-gates"] * (not gates)
    if device.type == "cuda":  # another device's type and backend would be the wrong workload
        kind = next(key for key, value in options.DTYPES.items() if value == dtype)
        run += ["--dtype", kind, "--backend", name]
    _print_commands([str(x) for x in what], run)


def _workload(
    layer: Shape,
    topk: float,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    backward: bool,
    gates: bool,
) -> Callable[[stage_hooks.Range], None]:
    """What is profiled: a forward, and with ``backward`` its gradients, in a range each."""
    size = 1, layer.grid.length, layer.heads, layer.head_dim
    *leaves, upstream = torch.randn(6, *size, device=device, dtype=dtype).unbind()
    q, k, v, *own_gates = leaves = [
        x.detach().requires_grad_(backward) for x in leaves[: 5 if gates else 3]
    ]
    named = dict(zip(("gate_coarse", "gate_fine"), own_gates, strict=False))
    call: Callable[..., Tensor] = partial(
        vsa.attention, q, k, v, topk, grid=layer.grid, backend=backend, **cast("Any", named)
    )

    def run(open_range: stage_hooks.Range) -> None:
        with torch.set_grad_enabled(backward), open_range("forward"):
            out = call()
        if backward:
            with open_range("backward"):
                torch.autograd.grad(out, leaves, upstream)

    return run


def _print_commands(what: list[str], run: list[str]) -> None:
    """Ready lines: a timeline, counters of every kernel, and how to read those."""
    command = shlex.join(["vsa", "profile", *what, *run])
    nsys = "nsys profile -t cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop"
    lines = [
        "On a Hopper GPU, a timeline and the time of each stage's kernels:",
        f"  {nsys} -f true -o vsa {command}",
        "  nsys stats --report nvtx_gpu_proj_sum vsa.nsys-rep",
        "Counters of every kernel, and a table of them (ncu holds the clock at its base):",
        f"  ncu --profile-from-start off --set full -f -o vsa {command} --repeats 1",
        "  ncu --import vsa.ncu-rep --csv --page raw --print-units base > vsa.csv",
        f"  {shlex.join(['vsa', 'profile', *what, '--read', 'vsa.csv'])}",
    ]
    typer.echo("\n" + "\n".join(lines))


def _show_report(path: Path, layer: Shape, topk: float) -> None:
    try:
        kernels = ncu_report.read(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--read") from None
    cost = vsa.flops(layer.grid, layer.heads, layer.head_dim, topk, backward=False)
    table = Table("kernel", title=f"{path.name}: means per launch")
    for column in ("launches", "µs", "MFU", *ncu_report.PERCENT):
        table.add_column(column, justify="right")
    table.add_column("waits, warps per instruction issued")
    for kernel in kernels:
        stalls = list(kernel.stalls.items())[:MOST_STALLS]
        table.add_row(
            kernel.name,
            str(kernel.launches),
            "-" if kernel.seconds is None else f"{kernel.seconds * 1e6:,.1f}",
            _percent(kernel.mfu(cost.fine), 100),
            *(_percent(kernel.percent[name]) for name in ncu_report.PERCENT),
            ", ".join(f"{reason} {value:.2f}" for reason, value in stalls),
        )
    console = wide_console(LOG_WIDTH)
    console.print(table)
    console.print(
        "MFU: products of our kernels on selected tokens over what the tensor cores could do in "
        "the same clocks. It is right only for the layer and topk that the report was made with."
    )


def _percent(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.1f} %"
