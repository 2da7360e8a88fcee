# SPDX-License-Identifier: Apache-2.0
"""Our kernels beside those of others on one Hopper GPU, on identical inputs in the same run.

usage: python bench/peers.py --peers DIR --captured captured.pt --out peers.json
       ncu --profile-from-start off python bench/peers.py --peers DIR --patterns random --once vsa

DIR (one or several) holds the archives that bench/fetch_peers.py makes; what is not there, or
cannot run here, is skipped with a reason. Every kernel runs in a process of its own, so that one
that crashes or hangs costs only its own rows. Its results are held to fp64 on sampled tiles before
it is timed. Times are medians of CUDA events, inputs are random and rotated so that none is in the
L2 cache, and nvidia-smi tells clock, power and whether power held the clock down meanwhile. These
calls follow each other; another time is that of a call after a rest, which ends before the power
limit holds the clock down if it is short. TFLOP/s count products between real tokens of selected
tiles, 4 x head_dim forward and 10 backward for each pair, of all tokens for a dense kernel. Shares
are of FlashAttention-3's dense rate at that layer, or of cuDNN's where it was not measured; which
one, the head of the table says.

Kernels that want contiguous tiles of 64 tokens get copies in that order, and patterns in their own
form, before the clock starts; ours reads raster order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from comparison import report, worker
from comparison.archives import Unavailable
from comparison.kernel import needs_gpu
from comparison.problem import Case
from vsa.measure import patterns
from vsa.measure.console import wide_console
from vsa.measure.layers import LAYERS, parse_layer
from vsa.measure.provenance import provenance, write

Row = dict[str, Any]
DIRECTIONS = ("forward", "backward")
TINY_LAYERS = ("4x8x12:2", "5x6x9:2")
LOG_WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--peers", type=Path, nargs="+", default=[], metavar="DIR")
    found.add_argument("--kernels", nargs="+", choices=worker.KERNELS, default=list(worker.KERNELS))
    found.add_argument("--layers", nargs="+", type=parse_layer, metavar="TxHxW:HEADS")
    found.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128), default=[128, 64])
    found.add_argument(
        "--patterns", nargs="+", choices=patterns.KINDS, help="sparsity patterns; default: all"
    )
    found.add_argument("--captured", type=Path, metavar="FILE", help="made by bench/captured.py")
    found.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    found.add_argument("--topk", type=float, default=0.125, help="share of the key tiles kept")
    found.add_argument("--seconds", type=float, default=0.6, help="on the clock for each row")
    found.add_argument("--patience", type=float, default=120.0, help="seconds without a new row")
    found.add_argument("--commit", help="of the sources, where they are no clone")
    found.add_argument(
        "--tiny", action="store_true", help="small layers on a CPU; times say nothing"
    )
    found.add_argument("--out", type=Path, metavar="FILE", help="write all rows to this .json file")
    found.add_argument(
        "--once", choices=worker.KERNELS, help="forward of the first case alone, for a profiler"
    )
    found.add_argument("--worker", nargs=2, metavar=("KERNEL", "FILE"), help=argparse.SUPPRESS)
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    """All layers and sparsity patterns, the captured one only where there is a file."""
    layers = options.layers or map(parse_layer, TINY_LAYERS if options.tiny else LAYERS)
    kinds = options.patterns or [
        kind for kind in patterns.KINDS if kind != "captured" or options.captured
    ]
    return [
        Case(grid, heads, head_dim, kind, options.topk)
        for (grid, heads), head_dim, kind in product(layers, options.head_dims, kinds)
    ]


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is started."""
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: --tiny runs small layers on the CPU")
    if "captured" in (options.patterns or []) and options.captured is None:
        parser.error("the captured pattern comes from a file of bench/captured.py: --captured")
    if options.captured is not None and not options.captured.is_file():
        parser.error(f"--captured must be a file that exists, but it is {options.captured}")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out must be in a folder that exists, but it is {options.out}")
    for folder in options.peers:
        if not folder.is_dir():
            parser.error(f"--peers must name folders that exist, but one is {folder}")


def watched(
    command: Sequence[str], to: Path, patience: float, note: Callable[[Row], None]
) -> str | None:
    """Run a worker, pass on the rows that it appends to a file; why it ended early, if it did."""
    with tempfile.TemporaryFile("w+") as said, to.open() as file:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        heard = time.monotonic()
        partial, over = "", False
        while not over:
            over = process.poll() is not None
            while line := file.readline():
                partial += line
                if partial.endswith("\n"):
                    note(json.loads(partial))
                    partial, heard = "", time.monotonic()
            if not over and time.monotonic() - heard > patience:
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it started
                process.wait()
                return f"it gave no row for {patience:.0f} s and was stopped"
            time.sleep(0.0 if over else 0.1)
        if process.returncode == 0:
            return None
        said.seek(0)
        last = ([line.strip() for line in said if line.strip()] or ["nothing"])[-1][:300]
        end = f"ended with exit status {process.returncode}"
        if process.returncode < 0:
            end = f"was killed by {signal.Signals(-process.returncode).name}"
        return f"its process {end}; it last said: {last}"


def device_of(options: argparse.Namespace) -> torch.device:
    """Where kernels run."""
    return torch.device("cpu") if options.tiny else torch.device("cuda", 0)


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """Every kernel in a process of its own, one after the other."""
    rows: list[Row] = []
    console = wide_console(LOG_WIDTH)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        each = {x: len(worker.cases_of(x, cases(options))) for x in options.kernels}
        total = sum(each.values()) * len(options.directions)
        task = progress.add_task("", total=total)

        def note(row: Row) -> None:
            rows.append(row)
            progress.advance(task)
            console.print(report.line(row), markup=False, highlight=False, soft_wrap=True)
            save(options, rows)

        for name in options.kernels:
            kernel = worker.KERNELS[name]
            progress.update(task, description=kernel.title)
            try:  # no process is needed to say so
                if kernel.gpu_only:
                    needs_gpu(device_of(options))
            except Unavailable as reason:
                note({"kernel": name, "skipped": str(reason)})
                continue
            with tempfile.TemporaryDirectory() as folder:
                to = Path(folder, "rows")
                to.touch()
                command = [sys.executable, __file__, *arguments, "--worker", name, str(to)]
                if reason := watched(command, to, options.patience, note):
                    note({"kernel": name, "failed": reason})
    return report.with_shares(rows)


def save(options: argparse.Namespace, rows: Sequence[Row], complete: bool = False) -> None:
    """Write what there is so far."""
    if options.out:
        write(options.out, options.head, report.with_shares(rows), complete)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print a line as each row comes and tables at the end, write JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    found = parser()
    options = found.parse_args(arguments)
    check(found, options)
    device = device_of(options)
    if options.worker:
        name, to = options.worker
        worker.run(
            name,
            cases(options),
            options.directions,
            device,
            options.peers,
            options.captured,
            options.seconds,
            Path(to),
        )
        return
    if options.once:
        worker.once(options.once, cases(options)[0], device, options.peers, options.captured)
        return
    options.head = provenance(device, command=["bench/peers.py", *arguments], commit=options.commit)
    console = wide_console(LOG_WIDTH)
    console.print(
        ", ".join(f"{name} {value}" for name, value in options.head.items()), markup=False
    )
    if options.patterns is None and options.captured is None:
        print("captured pattern: skipped, for no --captured names a file of bench/captured.py")
    rows = compare(options, arguments)
    save(options, rows, complete=True)
    for table in report.tables(rows):
        console.print(table)
    baselines = {row["baseline"] for row in rows if "baseline" in row}
    for name in sorted(baselines):
        console.print(f"Shares are of {worker.KERNELS[name].title}, in the same run.")
    if different := report.inconsistent(rows):
        sys.exit(f"kernels did not have the same inputs in {', '.join(different)}")
    if (
        not any(row["kernel"] == "vsa" and "tflops" in row for row in rows)
        and "vsa" in options.kernels
    ):
        sys.exit("our own kernels were not measured: the lines above say why")


if __name__ == "__main__":
    main()
