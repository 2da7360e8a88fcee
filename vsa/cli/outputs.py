# SPDX-License-Identifier: Apache-2.0
"""Files that commands write: refused before any work, and whole whenever a run ends."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

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


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Put a new file in the place of the old one, so that whoever reads finds one of the two.

    Args:
        path: None for nowhere.
        content: what JSON can hold.
    """
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
