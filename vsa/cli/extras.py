# SPDX-License-Identifier: Apache-2.0
"""Libraries that only some commands need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import typer

from vsa.installation import DISTRIBUTION


def require_demo_extra(*modules: str, purpose: str) -> None:
    """Give up with one sentence if a module of the demo extra is missing.

    Args:
        modules: import names; one that is not imported here may be asked for too.
        purpose: what they are needed for, the beginning of the sentence.

    Raises:
        typer.Exit: with code 1, after the sentence has been printed.
    """
    _require("demo", modules, purpose)


def require_diffusers_extra(purpose: str) -> None:
    """Give up with one sentence if diffusers is missing.

    Args:
        purpose: what it is needed for, the beginning of the sentence.

    Raises:
        typer.Exit: with code 1, after the sentence has been printed.
    """
    _require("diffusers", ("diffusers",), purpose)


def _require(extra: str, modules: Sequence[str], purpose: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        newer = ", with Python 3.11 or newer" * (extra == "diffusers")
        typer.echo(
            f"{purpose}, but {', '.join(missing)} cannot be imported: "
            f"run pip install '.[{extra}]' in a clone of {DISTRIBUTION}{newer}",
            err=True,
        )
        raise typer.Exit(code=1)
