# SPDX-License-Identifier: Apache-2.0
"""The command line: ``vsa info | demo | check | bench | profile | wan``, or ``python -m vsa``."""

from __future__ import annotations

import typer

from vsa.cli import bench, check, demo, info, profile, wan

app = typer.Typer(
    name="vsa",
    help="Video Sparse Attention: what runs here, what it gains, and whether it is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("info")(info.info)
app.command("demo")(demo.demo)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("profile")(profile.profile)
app.command("wan")(wan.wan)


def main() -> None:
    """Entry point of the ``vsa`` script."""
    app()
