# SPDX-License-Identifier: Apache-2.0
"""What each release of ptxas makes of the attention kernels: the table of sass.py, side by side.

usage: python bench/compilers.py [--only 12.9.86 13.0.88] [--markdown FILE]

Needs no GPU, but network and some minutes: the releases come from PyPI into a temporary folder.
From 13.0 on a release is there whole. Of 12.x only ptxas is, so that gets the PTX of 13.0.88, under
the number of the newest PTX that it reads. The last column says whether the machine code is the
one whose times are in this folder, byte by byte, that of 13.0.88.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

import compare_sass
import sass

MEASURED = "13.0.88"
"""The release whose machine code was measured, and that the build takes from PyPI."""
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85")
READS_PTX = {"12.8.93": "8.7", "12.9.86": "8.8"}
"""By release of 12.x: the newest PTX that its ptxas reads."""
RELEASES = (*READS_PTX, MEASURED, "13.1.115", "13.2.86", "13.5.37")


@dataclass
class Result:
    """What one release made of the kernels.

    Attributes:
        release: of nvcc, or of ptxas alone.
        kernels: of attention, as compiled.
        said: all that it said.
        digests: of every kernel's machine code; equal for equal code.
        failed: the first line of its error, where it did not compile them.
    """

    release: str
    kernels: list[sass.Kernel] = field(default_factory=list)
    said: str = ""
    digests: list[str] = field(default_factory=list)
    failed: str = ""

    @property
    def remarks(self) -> list[str]:
        """Codes of what ptxas remarks about products, as C7510 for serialised ones."""
        return sorted(set(re.findall(r"\bC75\d\d\b", self.said)))

    @property
    def overruns(self) -> list[str]:
        """Budgets that it does not hold."""
        return [fault for kernel in self.kernels for fault in sass.overruns(kernel)]


def install(wheels: Sequence[str], folder: Path) -> None:
    """Puts wheels of PyPI into a folder, without what they depend on."""
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *wheels], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"compilers.py: error: pip could not install {wheels}:\n{done.stderr}")


def toolkit(release: str, scratch: Path) -> Path:
    """The nvcc of a release from 13.0 on, with all that it needs."""
    folder = scratch / release
    if not folder.exists():
        parts = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")
        install([*(f"{part}=={release}" for part in parts), *HEADERS], folder)
    return folder / "nvidia" / "cu13" / "bin" / "nvcc"


def assemble(release: str, scratch: Path, folder: Path) -> tuple[list[Path], str]:
    """Cubins by the ptxas of a release of 12.x from PTX of 13.0, and what it said."""
    install([f"nvidia-cuda-nvcc-cu12=={release}"], scratch / release)
    ptxas = scratch / release / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)  # pip keeps no mode of files outside of its own bin
    cubins, said = [], ""
    for source in sass.SOURCES:
        ptx, cubin = folder / f"{source}.ptx", folder / f"{source}bin"
        flags = [flag for flag in sass.FLAGS if not flag.startswith(("-cubin", "-Xptxas"))]
        flags = [flag.replace("code=sm_90a", "code=compute_90a") for flag in flags]
        include = f"-I{sass.ROOT / 'csrc'}"
        command = [toolkit(MEASURED, scratch), *flags, include, "-ptx"]
        _run([*command, sass.ROOT / "csrc" / "launch" / source, "-o", ptx])
        text = re.sub(
            r"^\.version \S+", f".version {READS_PTX[release]}", ptx.read_text(), flags=re.M
        )
        ptx.write_text(text)
        said += _run([ptxas, "-O3", "-v", "-arch=sm_90a", ptx, "-o", cubin])
        cubins.append(cubin)
    return cubins, said


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr or done.stdout)
    return done.stdout + done.stderr


def compiled(release: str, scratch: Path, nvdisasm: str) -> Result:
    """What a release makes of the kernels, or why it makes nothing."""
    folder = scratch / f"{release}-cubins"
    folder.mkdir()
    try:
        if release in READS_PTX:
            cubins, said = assemble(release, scratch, folder)
        else:
            cubins, said = sass.compile_kernels(str(toolkit(release, scratch)), folder)
    except SystemExit as error:
        said = [line for line in str(error).splitlines() if "error" in line or "fatal" in line]
        return Result(release, failed=(said or [str(error)])[0])
    kernels = list(sass.kernels(cubins, said, nvdisasm))
    found = compare_sass.kernels(cubins)
    digests = sorted(digest for digest, names in found.items() for _ in names)
    return Result(release, kernels, said, digests)


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for every release, then a row for every kernel with a column for each."""
    measured = next((x.digests for x in results if x.release == MEASURED), None)
    lines = [
        "| ptxas | remarks | budgets that are not held | the code that was measured |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        if result.failed:
            lines.append(f"| {result.release} | | does not compile: {result.failed} | |")
            continue
        same = sum(digest in result.digests for digest in measured or ())
        known = f"{same} of {len(measured)} kernels" if measured else "not compiled here"
        remarks = ", ".join(result.remarks) or "none"
        held = "; ".join(result.overruns) or "none"
        lines.append(f"| {result.release} | {remarks} | {held} | {known} |")
    done = [result for result in results if not result.failed]
    lines += [
        "",
        "Instructions for a tile, exponentials beside products, local accesses in loops:",
        "",
        f"| kernel | {' | '.join(result.release for result in done)} |",
        "| --- |" + " --- |" * len(done),
    ]
    labels = [kernel.label for kernel in done[0].kernels] if done else []
    for label in labels:
        cells = []
        for result in done:
            kernel = next(kernel for kernel in result.kernels if kernel.label == label)
            cells.append(f"{kernel.executed}, {kernel.overlapped}, {kernel.local}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="the kernels' machine code by release of ptxas")
    parser.add_argument("--only", nargs="+", choices=RELEASES, default=RELEASES, metavar="RELEASE")
    parser.add_argument("--markdown", type=Path, help="a file for the tables as well")
    options = parser.parse_args(arguments)
    if (nvdisasm := sass.disassembler()) is None:
        parser.error("nvdisasm is needed: pip install nvidia-cuda-nvdisasm")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        console = Console(stderr=True)
        for release in track(options.only, "compiling", console=console):
            results.append(compiled(release, Path(folder), nvdisasm))
    print(table(results))
    if options.markdown is not None:
        options.markdown.write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
