# SPDX-License-Identifier: Apache-2.0
"""``vsa convert``: checkpoints from FastVideo's names to diffusers' and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vsa.integrations.checkpoints.convert import Conversion, conversion, gates_alone
from vsa.integrations.checkpoints.files import open_checkpoint
from vsa.integrations.checkpoints.names import TITLES

GIB = 2**30


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="A safetensors file, or a transformer's folder with one or with shards and index.",
        ),
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(help="A new file or folder, as the source is; else only say what is done."),
    ] = None,
    to: Annotated[
        Literal["diffusers", "fastvideo", "gates"],
        typer.Option(help="The names to write, or gates: one file with the learned gates alone."),
    ] = "diffusers",
) -> None:
    """Convert a checkpoint of Wan or MiniMax-H3 between FastVideo's own names and diffusers'.

    Tensors are copied byte by byte. Names that are unknown or missing are refused, and what is
    written is there whole or not at all.
    """
    try:
        checkpoint = open_checkpoint(source)
        plan = gates_alone(checkpoint) if to == "gates" else conversion(checkpoint, to)
        _say(plan, to)
        if destination is not None:
            plan.write(destination)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if destination is not None:
        typer.echo(f"{destination} is written, {plan.bytes / GIB:.2f} GiB.")


def _say(plan: Conversion, to: str) -> None:
    reading = plan.reading
    gates = f"{len(reading.gates)} of gates" if reading.gates else "none of gates"
    target = "the gates alone" if to == "gates" else f"{TITLES[to]} naming"  # type: ignore[index]
    left = f", {plan.skipped} left out" if plan.skipped else ""
    typer.echo(
        f"{reading.model.title}, {TITLES[reading.naming]} naming to {target}: "
        f"{len(plan.names)} tensors, {gates}{left}."
    )
    rules = plan.rules()
    width = max(len(old) for old, _ in rules)
    for (old, new), count in rules.items():
        if old != new:
            typer.echo(f"  {count:4}  {old:{width}}  {new}")
    if same := sum(count for (old, new), count in rules.items() if old == new):
        typer.echo(f"  {same:4}  keep their names")
