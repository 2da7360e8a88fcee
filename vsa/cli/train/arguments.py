# SPDX-License-Identifier: Apache-2.0
"""Options of ``vsa train``, by the panels of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vsa.cli import options
from vsa.training.attention import KINDS

STEPS = 300
"""Of a run that names neither steps nor minutes."""
RUN, DATA, OPTIMIZER = "How long, and what stays", "Data and evaluation", "Optimizer"
ADAPTING, MACHINE, DRAWING = "The kinds ramp and abrupt", "Machine", "Drawing runs"

Kinds = Annotated[
    str,
    typer.Option(
        metavar="KIND,KIND",
        help="What to train side by side: "
        + "; ".join(f"[bold]{name}[/bold], {what}" for name, what in KINDS.items())
        + ".",
    ),
]
Size = Annotated[
    Literal["tiny", "10m", "25m", "60m"],
    typer.Option(help="Of each model: 0.15 (tiny), 10.7, 27 or 57 million weights."),
]
Grid = Annotated[
    Any,
    typer.Option(
        parser=options.parse_extent,
        metavar="TxHxW",
        help="Tokens of a clip, in multiples of 4; a token is 1 frame x 4 x 4 pixels. By "
        "default 8x8x8 for tiny, else 16x16x16; the paper's is 16x32x32.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Steps in all. By default {STEPS}, or no limit with --minutes.",
        rich_help_panel=RUN,
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Train until so many minutes after the command's start, the last evaluation "
        "included; files are written after that.",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="Folder for loss.json, loss.png and what --keep says.", rich_help_panel=RUN),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in --out, of the same options.",
        rich_help_panel=RUN,
    ),
]
Keep = Annotated[
    Literal["all", "weights", "nothing"],
    typer.Option(
        help="all: a checkpoint to resume from (12 bytes per weight and kind) and the weights; "
        "weights: these alone, in bf16 (2 bytes per weight); nothing.",
        rich_help_panel=RUN,
    ),
]
Start = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        help="Start from trained weights: a file weights-KIND.pt for every kind, or a folder "
        "with one of each kind. This is how a dense model is made sparse by ramp or abrupt.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int,
    typer.Option(min=0, help="Of weights, data, times and noise.", rich_help_panel=OPTIMIZER),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Clips of a step. By default 4 for tiny, else 16,384 tokens.",
        rich_help_panel=OPTIMIZER,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Of AdamW. By default 3e-3 for tiny, else 6e-4 as in the paper.",
        rich_help_panel=OPTIMIZER,
    ),
]
Warmup = Annotated[
    int, typer.Option(min=0, help="Steps until --lr; then constant.", rich_help_panel=OPTIMIZER)
]
WeightDecay = Annotated[float, typer.Option(min=0.0, help="Of AdamW.", rich_help_panel=OPTIMIZER)]
ClipNorm = Annotated[
    float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=OPTIMIZER)
]
Ema = Annotated[
    float,
    typer.Option(
        help="Evaluate averaged weights of this decay, such as 0.999.",
        rich_help_panel=OPTIMIZER,
    ),
]
Times = Annotated[
    Literal["logit-normal", "uniform"],
    typer.Option(help="How times are distributed.", rich_help_panel=DATA),
]
Clips = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Generated training clips. By default 512 for tiny, else 4096.",
        rich_help_panel=DATA,
    ),
]
Real = Annotated[
    float,
    typer.Option(
        help="Share of real clips, from the extra demo; 0 needs no extra.", rich_help_panel=DATA
    ),
]
Cuts = Annotated[
    int,
    typer.Option(
        min=0,
        help="Frames between two jumps of the camera in generated clips, so that what belongs "
        "together lies apart and the nearest tiles do not hold it; 0 for none.",
        rich_help_panel=DATA,
    ),
]
HeldOut = Annotated[
    int,
    typer.Option(
        "--held-out",
        min=1,
        help="Clips to evaluate on, in whole batches.",
        rich_help_panel=DATA,
    ),
]
Every = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between evaluations. By default 50 for tiny, else 250.",
        rich_help_panel=DATA,
    ),
]
DenseSteps = Annotated[
    int,
    typer.Option(
        min=0, help="First steps in which ramp and abrupt are dense.", rich_help_panel=ADAPTING
    ),
]
RampEvery = Annotated[
    int, typer.Option(min=1, help="Steps between ramp's changes.", rich_help_panel=ADAPTING)
]
RampStep = Annotated[
    float, typer.Option(help="Density that ramp loses at a change.", rich_help_panel=ADAPTING)
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the blocks.", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="fp32, or bf16 for autocast; auto is bf16 on a GPU.", rich_help_panel=MACHINE
    ),
]
Runs = Annotated[
    list[Path],
    typer.Option(
        "--read",
        exists=True,
        dir_okay=False,
        help="Train nothing: draw --plot from the loss.json of a run. Repeat for several runs: "
        "they are compared by kind and seed, and laws are fitted to loss over FLOPs.",
        rich_help_panel=DRAWING,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(help="With --read, the .png file to draw them into.", rich_help_panel=DRAWING),
]
