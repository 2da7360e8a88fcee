# SPDX-License-Identifier: Apache-2.0
"""Where the clocks of a work tile of the forward kernel go, and what comes before the first one.

usage: python bench/work_tile_clocks.py [--patterns random correlated] [--head-dims 128 64]
       [--layers 32x32x32:12 20x48x80:8 7x22x40:32] [--captured captured.pt] [--out clocks.json]
       python bench/work_tile_clocks.py --build PROGRAM
       python bench/work_tile_clocks.py --binary PROGRAM ...

The fine stage in bf16, inputs of N(0,1), lists drawn on the CPU. Marks are put into a copy of the
kernel's headers (work_tile_marks.py): each notes how many clocks have gone by since the one before.
A consumer notes them until the launch ends, the scheduler warp until its first chunk is written.
work_tile_clocks.cu is compiled with that copy and with the headers as they are, and both run by
turns: their times beside each other say what marks cost. Outputs of both must be the same bits, and
sampled tiles within 1 % of fp64.

--build compiles PROGRAM, and PROGRAM-unmarked beside it, on a machine that may lack a GPU; --binary
runs them on one that may lack nvcc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa
from ceilings import FLAGS, find_nvcc
from tables_clocks import work_tile_clocks
from vsa.measure import patterns
from vsa.measure.layers import LAYERS, parse_layer
from vsa.measure.provenance import provenance, write
from vsa.values import checks
from vsa.values.grid import Extent
from vsa.verify.sampled import Sample
from work_tile_marks import CONSUMER, CSRC, LAUNCH, PARTS, SCHEDULER, marked_headers

SOURCE = Path(__file__).resolve().with_suffix(".cu")
MORE_LAYERS = ("7x22x40:32",)
"""LTX's, with short lists."""
TURNS = 2
Row = dict[str, Any]


class Case(NamedTuple):
    """What is called.

    Attributes:
        pattern: one of ``patterns.KINDS``.
        extent: of the grid, in tokens.
        heads: of queries and keys.
        head_dim: 64 or 128.
        topk: key tiles of every query tile.
    """

    pattern: str
    extent: Extent
    heads: int
    head_dim: int
    topk: int


def compile_program(nvcc: str, headers: Path, to: Path) -> str:
    """Compile the program with these headers; what the compilers said, which should be nothing.

    Raises:
        SystemExit: with what they said, where they failed.
    """
    command = [nvcc, *FLAGS, f"-I{headers}", "-o", to, SOURCE]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"nvcc did not compile the program of the work tiles:\n{said}")
    return said.strip()


def unmarked(program: Path) -> Path:
    """Where the program without marks is."""
    return program.with_name(f"{program.name}-unmarked")


def build(program: Path) -> None:
    """Compile the program with marks and without."""
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        said = compile_program(nvcc, marked_headers(Path(folder)), program)
    said += compile_program(nvcc, CSRC, unmarked(program))
    print(said, file=sys.stderr, end="")


def put(path: Path, numbers: Tensor) -> None:
    """A file of a tensor's numbers alone."""
    path.write_bytes(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def get(path: Path, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose numbers such a file holds."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(shape)


def run(program: Path, case: Case, folder: Path) -> Row:
    """What the program prints of a case whose files are in this folder.

    Raises:
        SystemExit: with what it said, where it failed.
    """
    numbers = case.head_dim, case.heads, *case.extent
    command = [str(program.resolve()), str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"it ended with {done.returncode}"
        raise SystemExit(f"work_tile_clocks.py: error: {program.name} failed: {said}")
    return json.loads(done.stdout)


def mean_clocks(consumers: int, parts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Clocks by name: of a consumer until its first work tile, of its work tiles, of a scheduler.

    Args:
        consumers: of a block.
        parts: clocks and times of each part, in the order of ``PARTS``; the scheduler's times are
            not counted.
    """
    clocks, times = ({name: parts[i][j] for i, name in enumerate(PARTS)} for j in (0, 1))
    for name in PARTS:
        if name in CONSUMER:
            times[name] = times["main loop"]
        elif name in SCHEDULER:
            times[name] = times[LAUNCH] // consumers
    return {name: clocks[name] / times[name] for name in PARTS}


def measured(case: Case, program: Path, captured: Path | None, device: torch.device) -> Row:
    """The row of a case.

    Raises:
        SystemExit: where outputs are wrong or not the same with marks, or lists cannot be read.
    """
    grid = vsa.Grid(case.extent)
    try:
        lists = patterns.selection(
            case.pattern, grid, case.heads, case.topk, torch.device("cpu"), captured
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"work_tile_clocks.py: error: {error}") from None
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, grid.length, case.heads, case.head_dim
    q, k, v = (torch.randn(shape, device=device, generator=generator).bfloat16() for _ in "qkv")
    found: dict[Path, list[Row]] = {unmarked(program): [], program: []}
    outputs = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "q": q,
            "k": k,
            "v": v,
            "bitmap": lists.bitmap,
            "axes": patterns.chosen_axes(lists),
        }
        for file, numbers in files.items():
            put(folder / file, numbers)
        for each in (*found,) * TURNS:
            found[each].append(run(each, case, folder))
            outputs.add((folder / "out").read_bytes() + (folder / "lse").read_bytes())
        out = get(folder / "out", torch.bfloat16, *shape)
        lse = get(folder / "lse", torch.float32, 1, case.heads, grid.length)
    if len(outputs) != 1:
        raise SystemExit("work_tile_clocks.py: error: outputs with marks and without differ")
    chosen = lists.mask()[0]
    sample = Sample(grid, chosen.to(device), q, k, v, torch.zeros_like(q))
    errors = sample.forward_errors(out.to(device), lse.to(device))
    if wrong := sample.verdict(errors):
        raise SystemExit(f"work_tile_clocks.py: error: {wrong}")
    sizes = grid.tile_sizes(chosen.device).double()
    pairs = torch.einsum("i,hij,j->", sizes, chosen.double(), sizes).item()
    plain, with_marks = found.values()
    consumers, parts = (with_marks[-1][name] for name in ("consumers", "parts"))
    ms = min(row["ms"] for row in plain)
    return {
        "pattern": case.pattern,
        "grid": list(case.extent),
        **{name: getattr(case, name) for name in ("heads", "head_dim", "topk")},
        "errors": errors,
        "unmarked_ms": [row["ms"] for row in plain],
        "marked_ms": [row["ms"] for row in with_marks],
        "tflops": 4 * case.head_dim * pairs / ms / 1e9,
        "consumers": consumers,
        "parts": dict(zip(PARTS, parts, strict=False)),
        "clocks": mean_clocks(consumers, parts),
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--patterns", nargs="+", choices=patterns.KINDS, default=list(patterns.DRAWN)
    )
    found.add_argument("--captured", type=Path, metavar="FILE", help="made by bench/captured.py")
    found.add_argument(
        "--layers",
        nargs="+",
        type=parse_layer,
        default=[parse_layer(text) for text in (*LAYERS, *MORE_LAYERS)],
        metavar="TxHxW:HEADS",
    )
    found.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128), default=[128, 64])
    found.add_argument("--topk", type=float, default=0.125, help="share of the key tiles kept")
    found.add_argument("--out", type=Path, metavar="FILE", help="write all rows to this .json file")
    found.add_argument("--commit", help="of the sources, where they are no clone")
    how = found.add_mutually_exclusive_group()
    how.add_argument("--build", type=Path, metavar="PROGRAM", help="compile to PROGRAM and stop")
    how.add_argument("--binary", type=Path, metavar="PROGRAM", help="run what --build made")
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    """All that is measured.

    Raises:
        ValueError: a share of the tiles that no list can have, or captured lists without a file.
    """
    if "captured" in options.patterns and options.captured is None:
        raise ValueError("--patterns captured needs --captured FILE, made by bench/captured.py")
    return [
        Case(pattern, extent, heads, head_dim, checks.top_k(options.topk, tiles, "--topk"))
        for pattern, (extent, heads), head_dim in product(
            options.patterns, options.layers, options.head_dims
        )
        for tiles in [vsa.Grid(extent).num_tiles]
    ]


def measure(options: argparse.Namespace, wanted: Sequence[Case], device: torch.device) -> None:
    """Compile where no program is named, measure, write JSON, print tables."""
    command = ["bench/work_tile_clocks.py", *sys.argv[1:]]
    head = provenance(device, command=command, commit=options.commit)
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        program = options.binary or Path(folder) / "work_tile_clocks"
        if not options.binary:
            build(program)
        for case in wanted:
            rows.append(measured(case, program, options.captured, device))
            write(options.out, head, rows, complete=case == wanted[-1])
    print("\n\n".join(work_tile_clocks(rows)))


def main() -> None:
    """Compile alone, or measure."""
    known = parser()
    options = known.parse_args()
    if options.build:
        build(options.build)
        return
    try:
        wanted = cases(options)
    except ValueError as error:
        known.error(str(error))
    for program in [options.binary, unmarked(options.binary)] if options.binary else []:
        if not program.is_file():
            known.error(f"--binary must name what --build made, but there is no {program}")
    if find_spec("vsa._C") is None:
        known.error("vsa's compiled part chooses which tiles are neighbours, and is missing here")
    if not torch.cuda.is_available():
        known.error("clocks are counted on a Hopper GPU, and PyTorch finds no GPU here")
    measure(options, wanted, torch.device("cuda"))


if __name__ == "__main__":
    main()
