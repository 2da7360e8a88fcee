# SPDX-License-Identifier: Apache-2.0
"""Binary kernels of others, from the archives that bench/fetch_peers.py makes."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path


class Unavailable(Exception):
    """A kernel that cannot run here, or not on this case, with the reason in one sentence."""


def unpacked(name: str, folders: Sequence[Path]) -> Path:
    """The folder with a kernel's files; an archive is unpacked once into the temporary folder.

    Raises:
        Unavailable: neither the folder nor the archive is there.
    """
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
        archive = folder / f"{name}.tar.xz"
        if archive.is_file():
            return _unpack(archive) / name
    looked = ", ".join(map(str, folders)) or "no folder, for none was given"
    raise Unavailable(f"{name}.tar.xz was looked for in {looked}: see bench/fetch_peers.py")


def _unpack(archive: Path) -> Path:
    facts = archive.stat()
    target = Path(tempfile.gettempdir(), "vsa-peers", f"{facts.st_size}-{facts.st_mtime_ns}")
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent))
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        part.rename(target)
    return target
