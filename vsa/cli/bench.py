# SPDX-License-Identifier: Apache-2.0
"""``vsa bench``: time and memory of sparse against dense attention on this machine."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.cli import layers, options
from vsa.cli.extras import require_demo_extra
from vsa.grid import Extent
from vsa.measure import peak_memory, seconds, spread


@dataclass(frozen=True)
class Measurement:
    """Sparse and dense attention on the same inputs in one run.

    Attributes:
        shape: its name in ``vsa.shapes``, or its grid.
        grid: (T, H, W) tokens.
        text: tokens that are not video.
        heads: query, key and value heads.
        head_dim: channels of a head.
        direction: "forward" or "forward+backward".
        kept: key tiles per query tile.
        tiles: key tiles in all.
        dense: median seconds of scaled_dot_product_attention.
        sparse: median seconds of vsa.attention, all stages.
        dense_spread: half the distance between the quartiles, as a share of the median.
        sparse_spread: likewise.
        dense_tflops: dense operations per second, in 10**12.
        sparse_tflops: operations on selected tokens per second, in 10**12.
        memory: peak bytes of vsa.attention beyond its inputs, outputs and gradients included.
        inputs: bytes of q, k and v.
    """

    shape: str
    grid: Extent
    text: int
    heads: int
    head_dim: int
    direction: str
    kept: int
    tiles: int
    dense: float
    sparse: float
    dense_spread: float
    sparse_spread: float
    dense_tflops: float
    sparse_tflops: float
    memory: int
    inputs: int


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

    Inputs are random, so the tiles that are kept have no structure to exploit. TFLOP/s count
    selected tokens only. --shape, --grid and --topk may be given several times; the default is
    --grid 16,32,16 --topk 0.125.
    """
    options.check_folder(json_file, ".json", "--json")
    options.check_folder(plot, ".png", "--plot")
    if plot is not None:
        require_demo_extra("matplotlib", purpose="the plot is drawn by matplotlib")
    grid, topk = layers.swept(sweep, shape, grid, topk)
    cases = layers.layers(shape, grid, tile, heads, head_dim)
    for each in cases.values():
        name = options.check_backend(backend, device, dtype, each.head_dim, not forward_only)
    console = Console()
    directions = ["forward"] if forward_only else ["forward", "forward+backward"]
    measurements = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=len(cases) * len(topk) * len(directions))
        for called, case in cases.items():
            size = 3, 1, case.grid.length, case.heads, case.head_dim
            inputs = torch.randn(size, device=device, dtype=dtype)
            for share in topk:
                for direction in directions:
                    what = case.grid, share, direction, name, repeats
                    measurements.append(_measure(inputs, called, *what))
                    progress.advance(task)
    console.print(*_tables(measurements), sep="\n")
    kind = str(dtype).removeprefix("torch.")
    head = f"{options.machine(device)}, backend {name}, {kind}, vsa {vsa.__version__}"
    console.print(f"{head}, {date.today()}; median of {repeats}, ± half the quartile distance")
    if json_file is not None:
        rows = [asdict(row) for row in measurements]
        json_file.write_text(
            json.dumps({"machine": head, "date": str(date.today()), "rows": rows}, indent=1)
        )
    if plot is not None:
        from vsa.cli.bench_plot import draw, draw_sweep  # needs the extra

        if sweep is None:
            draw(measurements, head, plot)
        else:
            draw_sweep(measurements, sweep, head, plot)


def _measure(
    inputs: Tensor,
    shape: str,
    grid: vsa.Grid,
    topk: float,
    direction: str,
    backend: str,
    repeats: int,
) -> Measurement:
    q, k, v = (x.detach().requires_grad_(direction != "forward") for x in inputs)

    def dense() -> Tensor:
        return functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)

    def sparse() -> Tensor:
        return vsa.attention(q, k, v, topk, grid=grid, backend=backend)

    upstream = torch.randn_like(q)

    def with_backward(function):
        return lambda: torch.autograd.grad(function(), (q, k, v), upstream)

    if direction == "forward":
        runs = dense, sparse
    else:
        runs = with_backward(dense), with_backward(sparse)
    dense_times, sparse_times = (seconds(run, q.device, repeats) for run in runs)
    _, memory = peak_memory(runs[1], q.device)
    cost = vsa.flops(grid, q.shape[2], q.shape[3], topk, backward=direction != "forward")
    kept = vsa.checks.top_k(topk, grid.num_tiles)
    dense_time, sparse_time = statistics.median(dense_times), statistics.median(sparse_times)
    return Measurement(
        shape=shape,
        grid=grid.shape,
        text=grid.text,
        heads=q.shape[2],
        head_dim=q.shape[3],
        direction=direction,
        kept=kept,
        tiles=grid.num_tiles,
        dense=dense_time,
        sparse=sparse_time,
        dense_spread=spread(dense_times),
        sparse_spread=spread(sparse_times),
        dense_tflops=cost.full / dense_time / 1e12,
        sparse_tflops=cost.fine / sparse_time / 1e12,
        memory=memory,
        inputs=inputs.nbytes,
    )


def _tables(measurements: list[Measurement]) -> Iterator[Table]:
    """One for each layer, narrow enough for 80 columns."""
    for layer, rows in groupby(measurements, _layer):
        table = Table(title=layer, title_justify="left")
        table.add_column("direction", no_wrap=True)
        for column in ("dense", "sparse", "speed-up", "memory"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row.direction,
                _time(row.dense, row.dense_spread, row.dense_tflops),
                _time(row.sparse, row.sparse_spread, row.sparse_tflops),
                f"[bold]{row.dense / row.sparse:.2f}x[/bold]\n"
                f"{row.sparse_tflops / row.dense_tflops:.0%} rate",
                f"{row.memory / row.inputs:.2f}x\ninputs",
            )
        yield table


def _time(seconds: float, spread: float, tflops: float) -> str:
    return f"{seconds * 1e3:,.1f} ms ±{spread:.0%}\n{tflops:.3g} TFLOP/s"


def _layer(row: Measurement) -> str:
    text = f" + {row.text}" if row.text else ""
    return (
        f"{math.prod(row.grid):,}{text} tokens = {row.shape}, {row.heads} heads of "
        f"{row.head_dim}, {row.kept} of {row.tiles} tiles kept ({row.kept / row.tiles:.1%})"
    )
