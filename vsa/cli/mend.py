# SPDX-License-Identifier: Apache-2.0
"""``vsa mend``: where there is something to mend, it is done before this package is imported."""

from __future__ import annotations

import typer


def mend() -> None:
    """Make import vsa give this project again after the distribution vsa took its place.

    FastVideo's distribution vsa has the same import name. Installed later it overwrites one file,
    uninstalled later it removes that file; this puts it back, and both stay installed.
    """
    typer.echo("vsa: nothing to mend, import vsa gives this project")
