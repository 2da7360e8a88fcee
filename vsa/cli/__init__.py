# SPDX-License-Identifier: Apache-2.0
"""The command line: ``vsa info | demo | check | bench | profile | wan | convert | train``."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

import vsa
from vsa.cli import info, mend
from vsa.cli.bench import command as bench
from vsa.cli.check import command as check
from vsa.cli.convert import command as convert
from vsa.cli.demo import command as demo
from vsa.cli.profile import command as profile
from vsa.cli.train import command as train
from vsa.cli.wan import command as wan

app = typer.Typer(
    name="vsa",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vsa {vsa.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Video Sparse Attention: what runs here, what it gains, and whether it is right."""


COMMANDS = (
    *(info.info, demo.demo, check.check, bench.bench, profile.profile),
    *(wan.wan, convert.convert, train.train, mend.mend),
)
for command in COMMANDS:
    # Rich breaks paragraphs for the terminal; it would keep the breaks of the source as well.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(command.__name__, help=text)(command)


def main() -> None:
    """Entry point of the ``vsa`` script."""
    app()
