# SPDX-License-Identifier: Apache-2.0
"""What is installed under the name ``vsa``: this project, and nobody else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "video-sparse-attention"


def installed_version() -> str:
    """The version of this project.

    Raises:
        ImportError: another project's package has the same import name, or this one is not
            installed.
    """
    try:
        foreign = version("vsa")
    except PackageNotFoundError:
        pass
    else:
        raise ImportError(
            f"the import name vsa belongs to two installed projects: {DISTRIBUTION} "
            "and the unrelated distribution "
            f"vsa {foreign}, which overwrites its files; run: pip uninstall -y vsa {DISTRIBUTION}, "
            f"then install {DISTRIBUTION} again"
        )
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        raise ImportError(
            f"{DISTRIBUTION} is not installed: run pip install . in the project's folder"
        ) from None
