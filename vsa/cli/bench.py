# SPDX-License-Identifier: Apache-2.0
"""``vsa bench``: time and memory of sparse against dense attention on this machine."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vsa
from vsa import lists as lists_of
from vsa.cli import layers, options
from vsa.cli.bench_case import Case, Measurement, WrongResults, inputs_of
from vsa.cli.extras import require_demo_extra
from vsa.cli.provenance import provenance
from vsa.cli.stage_table import stage_table
from vsa.monitor import Monitor
from vsa.shapes import Shape

CHOSEN = "chosen"


def parse_lists(text: str) -> str:
    """A kind of lists, or the file that holds captured ones."""
    if text not in (CHOSEN, *lists_of.DRAWN) and not Path(text).is_file():
        raise typer.BadParameter(
            f"lists must be chosen, random, correlated or a file, but they are {text!r}"
        )
    return text


def bench(
    shape: Annotated[list[str], layers.SHAPE] = [],  # noqa: B006  typer copies it
    grid: Annotated[list[Any], layers.GRID] = [],  # noqa: B006
    sweep: layers.Sweep = None,
    heads: layers.Heads = None,
    head_dim: layers.HeadDim = None,
    topk: Annotated[
        list[float],
        typer.Option(
            "--topk",
            parser=options.parse_topk,
            metavar="N",
            help="Key tiles per query tile, share or number.",
        ),
    ] = [],  # noqa: B006
    tile: options.TileShape = "4,4,4",
    dtype: Annotated[
        torch.dtype,
        typer.Option(
            "--dtype", parser=options.parse_dtype, metavar="DTYPE", help="fp32, bf16 or fp16."
        ),
    ] = "fp32",
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    lists: Annotated[
        str,
        typer.Option(
            "--lists",
            parser=parse_lists,
            metavar="KIND",
            help="Which tiles are kept: chosen by attention from q and k; or, without the coarse "
            "stage and the choice, random, correlated, or a file of bench/captured.py.",
        ),
    ] = CHOSEN,
    with_stages: Annotated[
        bool, typer.Option("--stages", help="Time the stages too, called one by one.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median counts.")] = 5,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Leave the backward out.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this .json file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speed-ups into this .png file.")
    ] = None,
) -> None:
    """Time vsa.attention against dense attention in the same run, forward and forward+backward.

    Sampled tiles are held to fp64 first. Inputs are random, so the tiles that attention chooses
    have no structure to exploit, and on a GPU calls go round as many as are beyond its L2 cache.
    TFLOP/s count selected tokens only; MHz and W are nvidia-smi's meanwhile. --shape, --grid and
    --topk may be given several times; the default is --grid 16,32,16 --topk 0.125.
    """
    options.check_folder(json_file, ".json", "--json")
    options.check_folder(plot, ".png", "--plot")
    if plot is not None:
        require_demo_extra("matplotlib", purpose="the plot is drawn by matplotlib")
    grid, topk = layers.swept(sweep, shape, grid, topk)
    cases = layers.layers(shape, grid, tile, heads, head_dim)
    for each in cases.values():
        name = options.check_backend(backend, device, dtype, each.head_dim, not forward_only)
    selections = {
        (called, share): _selection(lists, layer, share, device)
        for called, layer in cases.items()
        for share in topk
    }
    console = Console()
    directions = ["forward"] if forward_only else ["forward", "forward+backward"]
    measurements = []
    wrong = None
    with Progress(console=console, transient=True) as progress, Monitor(device) as monitor:
        task = progress.add_task("timing", total=len(cases) * len(topk) * len(directions))
        try:
            for called, layer in cases.items():
                inputs = inputs_of(layer, device, dtype)
                for share, direction in product(topk, directions):
                    case = Case(
                        called,
                        layer,
                        share,
                        Path(lists).name,
                        selections[called, share],
                        name,
                        repeats,
                        inputs,
                        with_stages,
                    )
                    measurements.append(case.measure(direction, monitor))
                    progress.advance(task)
        except WrongResults as error:
            wrong = str(error)
    console.print(*_tables(measurements), sep="\n")
    kind = str(dtype).removeprefix("torch.")
    head = f"{options.machine(device)}, backend {name}, {kind}, vsa {vsa.__version__}"
    console.print(f"{head}, {date.today()}; median of {repeats}, ± half the quartile distance")
    if measurements:
        worst = max(max(row.errors.values()) for row in measurements)
        console.print(f"Sampled tiles lie within {worst:.1e} of fp64.")
    if json_file is not None:
        rows = [asdict(row) for row in measurements]
        about = {"command": shlex.join(["vsa", *sys.argv[1:]]), "backend": name, "dtype": kind}
        json_file.write_text(json.dumps(provenance(device) | about | {"rows": rows}, indent=1))
    if wrong is not None:
        console.print(f"[bold red]{wrong}; `vsa check` says more[/bold red]")
        raise typer.Exit(1)
    if plot is not None:
        from vsa.cli.bench_plot import draw, draw_sweep  # needs the extra

        if sweep is None:
            draw(measurements, head, plot)
        else:
            draw_sweep(measurements, sweep, head, plot)


def _selection(kind: str, layer: Shape, share: float, device: torch.device) -> vsa.Selection | None:
    """The lists of a layer; none where attention chooses."""
    if kind == CHOSEN:
        return None
    kind, file = (kind, None) if kind in lists_of.DRAWN else ("captured", Path(kind))
    topk = vsa.checks.top_k(share, layer.grid.num_tiles)
    try:
        return lists_of.selection(kind, layer.grid, layer.heads, topk, device, file)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lists") from None


def _tables(measurements: list[Measurement]) -> Iterator[Table]:
    """One for each layer, narrow enough for 80 columns."""
    for layer, group in groupby(measurements, _layer):
        rows = list(group)
        table = Table(title=layer, title_justify="left")
        table.add_column("direction", no_wrap=True)
        for column in ("dense", "sparse", "speed-up", "memory"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row.direction,
                time_and_rate(row.dense, row.dense_spread, row.dense_tflops, row.dense_gpu),
                time_and_rate(row.sparse, row.sparse_spread, row.sparse_tflops, row.sparse_gpu),
                f"[bold]{row.dense / row.sparse:.2f}x[/bold]\n"
                f"{row.sparse_tflops / row.dense_tflops:.0%} rate",
                f"{row.memory / row.inputs:.2f}x\ninputs",
            )
        yield table
        for row in rows:
            if row.stages:
                yield stage_table(row.stages, title=f"stages, {row.direction}")


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
        + (f", {row.lists} lists" if row.lists != CHOSEN else "")
    )
