# SPDX-License-Identifier: Apache-2.0
"""What ``import vsa`` gives: this project whole, never a source folder that nobody has built."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import video_sparse_attention
from video_sparse_attention import DISTRIBUTION, MARK, digest_of_sources

__all__ = ["DISTRIBUTION", "installed_version", "take_built"]


def installed_version() -> str:
    """The version of this project.

    Raises:
        ImportError: another distribution overwrote files of this one, or it is not installed.
    """
    if why := video_sparse_attention.overwritten():
        raise ImportError(why)
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        raise ImportError(
            f"{DISTRIBUTION} is not installed: run pip install . in the project's folder"
        ) from None


def take_built(folder: Path) -> bool:
    """Whether ``folder`` is to be imported; else the installed package has taken its name.

    In the root of a clone Python meets the folder of sources first. Without what the build leaves
    there it would run on slower paths, so the installed package is loaded in its place.

    Args:
        folder: of the ``vsa/__init__.py`` that is being imported.

    Raises:
        ImportError: sources that nobody has built, and no package is installed.
    """
    if not _is_unbuilt(folder):
        _warn_if_stale(folder)
        return True
    spec = _elsewhere(folder)
    if spec is None or spec.loader is None or spec.origin is None:
        why = (
            f"vsa is imported from its sources in {folder}, which were not built, and no installed "
            f"package was found: run pip install . (or pip install -e .) in {folder.parent}"
        )
        if video_sparse_attention.is_command():
            video_sparse_attention.refuse(why)
        raise ImportError(why)
    installed = Path(spec.origin).parent
    if changed := _differing(folder, installed):
        warnings.warn(
            f"the sources in {folder} were not built, so vsa is the installed package in "
            f"{installed}, from which {changed} of their files differ: run pip install . again, "
            "or pip install -e . to run the sources themselves",
            stacklevel=3,
        )
    sys.modules.pop(__name__, None)  # this one belongs to the sources
    package = importlib.util.module_from_spec(spec)
    sys.modules["vsa"] = package
    spec.loader.exec_module(package)
    return False


def _warn_if_stale(folder: Path) -> None:
    """Python of today beside kernels of yesterday could compute wrong numbers in silence."""
    sources, record = folder.parent / "csrc", folder / "_build.json"
    if not (sources.is_dir() and record.is_file()):
        return
    built_from = json.loads(record.read_text()).get("sources")
    if built_from is not None and built_from != digest_of_sources(sources):
        warnings.warn(
            f"vsa._C in {folder} was compiled from other sources than {sources} holds now, and may "
            f"compute wrong numbers: run pip install -e . again in {folder.parent}",
            stacklevel=4,
        )


def _is_unbuilt(folder: Path) -> bool:
    """Sources beside their pyproject.toml, without anything that a build in place leaves."""
    is_source = (folder.parent / "pyproject.toml").is_file()
    built = (folder / "_build.json").is_file() or any(folder.glob("_C*.so"))
    return is_source and not built


def _elsewhere(folder: Path) -> ModuleSpec | None:
    """This project's package as Python finds it without the parent of ``folder``."""
    paths = [path for path in sys.path if Path(path or ".").resolve() != folder.parent]
    for finder in sys.meta_path:
        spec = finder.find_spec("vsa", paths)
        if spec is None or spec.origin is None or Path(spec.origin).parent == folder:
            continue
        return spec if MARK in Path(spec.origin).read_text(errors="replace") else None
    return None


def _differing(sources: Path, installed: Path) -> int:
    """How many Python files of the sources the installed package has not, or has otherwise."""

    def contents(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    files = (path.relative_to(sources) for path in sources.rglob("*.py"))
    return sum(contents(sources / file) != contents(installed / file) for file in files)
