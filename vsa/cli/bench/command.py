# SPDX-License-Identifier: Apache-2.0
"""``vsa bench``: time and memory of sparse against dense attention on this machine."""

from __future__ import annotations

from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import vsa
from vsa.cli import options, patience
from vsa.cli.bench import layers as layers
from vsa.cli.bench.case import Case, WrongResults, dense_kernel, inputs_of
from vsa.cli.bench.measurement import Measurement
from vsa.cli.bench.table import CHOSEN, line, tables
from vsa.cli.extras import require_demo_extra
from vsa.cli.outputs import INTERRUPTED, check_output
from vsa.measure import patterns
from vsa.measure.gpu_monitor import Monitor
from vsa.measure.machine import BUSY_LOAD, machine, other_load
from vsa.measure.provenance import provenance, read, write
from vsa.measure.shapes import Shape
from vsa.values import checks


def parse_pattern(text: str) -> str:
    """A kind of sparsity pattern, or the file that holds captured ones."""
    if text not in (CHOSEN, *patterns.DRAWN) and not Path(text).is_file():
        raise typer.BadParameter(
            f"a sparsity pattern must be chosen, random, correlated or a file, but it is {text!r}"
        )
    return text


PATTERN: dict[str, Any] = {"parser": parse_pattern, "metavar": "KIND"}


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
    score: Annotated[
        Any,
        typer.Option(
            "--score",
            parser=options.parse_score,
            metavar="SCORE",
            help="What attention chooses tiles by: mean, or sub-blocks:N for vsa.SubBlocks(N).",
        ),
    ] = "mean",
    dtype: Annotated[
        torch.dtype,
        typer.Option(
            "--dtype", parser=options.parse_dtype, metavar="DTYPE", help=options.DTYPE_HELP
        ),
    ] = "fp32",
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    pattern: Annotated[
        str,
        typer.Option(
            "--patterns",
            **PATTERN,
            help="Which tiles are kept: chosen by attention from q and k; or, without the coarse "
            "stage and the choice, random, correlated, or a file of bench/captured.py.",
        ),
    ] = CHOSEN,
    lists: Annotated[str | None, typer.Option("--lists", **PATTERN, hidden=True)] = None,
    tail: Annotated[
        bool,
        typer.Option("--tail", help="Tiles that are not chosen enter the softmax by their means."),
    ] = False,
    precision: Annotated[
        Any,
        typer.Option(
            "--precision",
            parser=options.parse_precision,
            metavar="NAME",
            help="native; or the fine stage in int8 or fp8, forward only, with native beside it.",
        ),
    ] = "native",
    with_stages: Annotated[
        bool, typer.Option("--stages", help="Time the stages too, called one by one.")
    ] = False,
    with_ways: Annotated[
        bool,
        typer.Option("--graph", help="Time the calls in a CUDA graph and compiled too."),
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
    rows_file: Annotated[
        Path | None,
        typer.Option(
            "--read",
            exists=True,
            dir_okay=False,
            help="Measure nothing: draw --plot from a file that --json wrote.",
        ),
    ] = None,
) -> None:
    """Time vsa.attention against dense attention in the same run, forward and forward+backward.

    Sampled tiles are held to fp64 first. Inputs are random, so the tiles that attention chooses
    have no structure to exploit, and on a GPU calls go round as many as are beyond its L2 cache.
    TFLOP/s count selected tokens only; MHz and W are nvidia-smi's meanwhile. --shape, --grid and
    --topk may be given several times; the default is --grid 16,32,16 --topk 0.125.

    Every row is printed, and written to --json, when it has been measured: what is interrupted
    keeps its rows. On a CPU sweeps are of smaller videos, and a run that will be long says so.
    """
    check_output(json_file, ".json", "--json")
    check_output(plot, ".png", "--plot")
    if plot is not None:
        require_demo_extra("matplotlib", purpose="the plot is drawn by matplotlib")
    if rows_file is not None:
        _draw_again(rows_file, plot)
        return
    if with_ways and device.type != "cuda":
        raise typer.BadParameter(
            f"CUDA graphs need a CUDA device, but --device is {device.type}", param_hint="--graph"
        )
    pattern = lists or pattern
    if score != "mean" and pattern != CHOSEN:
        raise typer.BadParameter(
            f"nothing is chosen where --patterns is {pattern}: leave --score out",
            param_hint="--score",
        )
    low = precision != "native"
    if tail and low:
        raise typer.BadParameter(f"{precision} has no tail: leave it out", param_hint="--tail")
    forward_only |= low
    grid, topk = layers.swept(sweep, shape, grid, topk, device)
    cases = layers.layers(shape, grid, tile, heads, head_dim)
    for each in cases.values():
        name = options.check_backend(
            backend, device, dtype, each.head_dim, not forward_only, precision
        )
    selections = {
        (called, share): _selection(pattern, layer, share, device)
        for called, layer in cases.items()
        for share in topk
    }
    console = Console()
    directions = ["forward"] if forward_only else ["forward", "forward+backward"]
    rows = [
        (layer, share, way != "forward")
        for layer, share, way in product(cases.values(), topk, directions)
    ]
    if slow := patience.warning(rows, repeats, device, dtype, name):
        console.print(f"[yellow]{slow}[/yellow]")
    load = other_load() if device.type == "cpu" else 0.0
    if load > BUSY_LOAD:
        console.print(
            f"[yellow]Other programs kept {load:.0%} of this machine's cores busy in the last "
            "minute: times and speed-ups here mean little.[/yellow]"
        )
    kind = str(dtype).removeprefix("torch.")
    about: dict[str, Any] = provenance(device) | {"backend": name, "dtype": kind, "sweep": sweep}
    about |= {"score": str(score), "precision": precision}
    measurements: list[Measurement] = []

    def keep(complete: bool) -> None:
        write(json_file, about, [row.row() for row in measurements], complete)

    stopped = None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        Monitor(device) as monitor,
    ):
        task = progress.add_task("inputs", total=len(rows))
        keep(complete=False)
        try:
            for called, layer in cases.items():
                inputs = inputs_of(layer, device, dtype)
                dense = about["dense_kernel"] = dense_kernel(inputs[0], not forward_only)
                for share, direction in product(topk, directions):
                    case = Case(
                        called,
                        layer,
                        share,
                        Path(pattern).name,
                        selections[called, share],
                        name,
                        repeats,
                        score,
                        inputs,
                        with_stages,
                        with_ways,
                        tail,
                        precision,
                    )
                    progress.update(task, description=f"{called}, topk {share:g}, {direction}")
                    measurements.append(case.measure(direction, monitor))
                    progress.console.print(line(measurements[-1]), soft_wrap=True)
                    progress.advance(task)
                    keep(complete=len(measurements) == len(rows))
        except WrongResults as error:
            stopped = f"{error}; `vsa check` says more", 1
        except KeyboardInterrupt:
            stopped = f"interrupted after {len(measurements)} of {len(rows)} rows", INTERRUPTED
    console.print(*tables(measurements), sep="\n")
    by = "" if score == "mean" else f", {score}"
    by += f", {precision} beside native" if low else ""
    head = f"{machine(device)}, backend {name}, {kind}{by}, vsa {vsa.__version__}"
    console.print(f"{head}, {date.today()}; median of {repeats}, ± half the quartile distance")
    if measurements:
        worst = max(max(row.errors.values()) for row in measurements)
        console.print(f"Sampled tiles lie within {worst:.1e} of fp64.")
        if low:
            console.print(
                "Errors are those of the output on sampled tiles, relative, against fp64."
            )
    if stopped is not None:
        console.print(f"[bold red]{stopped[0]}[/bold red]")
        raise typer.Exit(stopped[1])
    if plot is not None:
        _draw(measurements, sweep, head, dense, plot)


def _draw(
    rows: list[Measurement], sweep: str | None, about: str, dense: str, picture: Path
) -> None:
    from vsa.cli.bench.plot import draw, draw_sweep  # needs the extra

    if sweep is None:
        draw(rows, about, dense, picture)
    else:
        draw_sweep(rows, sweep, about, dense, picture)


def _draw_again(file: Path, picture: Path | None) -> None:
    """What --plot drew, or would have drawn, when the file was written."""
    if picture is None:
        raise typer.BadParameter("--plot must name the picture to draw", param_hint="--read")
    try:
        found = read(file)
        rows = [Measurement.of_row(row) for row in found["rows"]]
        if not rows:
            raise ValueError(f"{file} must have a row at least, but has none")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--read") from None
    about = f"{found['device']}, PyTorch {found['torch']}, backend {found['backend']}, "
    about += f"{found['dtype']}, commit {(found['commit'] or 'unknown')[:12]}, {found['date']}"
    _draw(rows, found["sweep"], about, found["dense_kernel"], picture)


def _selection(kind: str, layer: Shape, share: float, device: torch.device) -> vsa.Selection | None:
    """The sparsity pattern of a layer; none where attention chooses."""
    if kind == CHOSEN:
        return None
    kind, file = (kind, None) if kind in patterns.DRAWN else ("captured", Path(kind))
    topk = checks.top_k(share, layer.grid.num_tiles)
    try:
        return patterns.selection(kind, layer.grid, layer.heads, topk, device, file)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--patterns") from None
