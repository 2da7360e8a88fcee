# SPDX-License-Identifier: Apache-2.0
"""Files that commands write, refused before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def check_output(path: Path | None, suffix: str, hint: str) -> None:
    """A file to write must have the right ending and a place where it can be written.

    Raises:
        typer.BadParameter: before any work is done.
    """
    if path is None:
        return
    if path.suffix != suffix or not path.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"a {suffix} file in a folder that exists is needed, but it is {path}", param_hint=hint
        )
    try:
        if path.exists():
            with path.open("ab"):
                pass
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"a file that can be written is needed, but {path} cannot be: {error.strerror}",
            param_hint=hint,
        ) from None
