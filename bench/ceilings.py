# SPDX-License-Identifier: Apache-2.0
"""Ceilings of one Hopper GPU, measured: what its memory, tensor cores and exponentials allow.

usage: python bench/ceilings.py --out ceilings.json

Compiles ceilings.cu and the loops beside it with nvcc and runs each group of measurements in a
process of its own, so that one that fails costs only its own rows. Where there is no nvcc, compile
elsewhere with ``--compile FILE`` and pass ``--program FILE``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from vsa.measure.provenance import provenance, write

ROOT = Path(__file__).resolve().parent.parent
TARGET = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ["-std=c++20", "-O3", TARGET, "-Xcompiler", "-Wall,-Wextra"]
TOOLKITS = "/usr/local/cuda/bin/nvcc", "/usr/local/bin/nvcc"
PATIENCE = 240
"""Seconds that a group may take; two would do."""
RATES = (
    "TB/s",
    "B/clk/SM",
    "TFLOP/s",
    "FLOP/clk/SM",
    "clk/product",
    "clk/tile",
    "clk/pair",
    "exp2/clk/SM",
    "GHz",
    "TFLOP/s long",
    "pJ/FLOP",
)
"""What `with_rates` may give a row."""
GROUPS = {
    "loads": "random tiles of 4x4x4 tokens from L2 to shared memory",
    "products": "the same with products: each tile used by one or two warpgroups of the block",
    "loops": "a forward's consumers with all that they wait for there: scores, softmax, output",
    "backward": "a backward's consumers likewise: in two passes, and in one that adds dQ on chip",
    "reduce": "fp32 tiles added to global memory (cp.reduce.async.bulk)",
    "both": "tiles from L2 while as many bytes of fp32 are added to it: a backward in one pass",
    "wgmma": "matrix products from operands that stay where they are",
    "exp2": "ex2.approx",
}
Row = dict[str, Any]


def compile_program(nvcc: str, to: Path) -> str:
    """Compile the program; what the compilers said, which should be nothing.

    A line with C75xx would say that ptxas serialised products, whose rate then means nothing.

    Raises:
        SystemExit: with what they said, where they failed.
    """
    names = "ceilings.cu", "ceilings_forward.cu", "ceilings_backward.cu"
    sources = [ROOT / "bench" / name for name in names]
    includes = f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bench'}"
    command = [nvcc, *FLAGS, *includes, "-o", to, *sources, "-ldl"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"nvcc did not compile the program of the ceilings:\n{said}")
    return said.strip()


def find_nvcc() -> str:
    """The compiler on PATH, or where toolkits install it.

    Raises:
        SystemExit: if there is none.
    """
    found = shutil.which("nvcc") or next((x for x in TOOLKITS if Path(x).exists()), None)
    if found is None:
        raise SystemExit("nvcc is needed, or a program compiled elsewhere: see --help")
    return found


def run(program: Path, group: str) -> list[Row]:
    """Rows of a group, with rates; a row with an ``error`` last if it did not get to its end."""
    try:
        done = subprocess.run([program, group], capture_output=True, text=True, timeout=PATIENCE)
        said, failed = done.stdout, (done.stderr.strip() or "no reason") if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        said, failed = (late.stdout or b"").decode(), f"it took more than {PATIENCE} s"
    lines = (line for line in said.splitlines() if line.endswith("}"))
    rows = [with_rates(json.loads(line)) for line in lines]
    return rows + [{"group": group, "error": failed}] * bool(failed)


def with_rates(row: Row) -> Row:
    """A row of the program with its rates: per second, and per clock of a multiprocessor.

    The clock is the slowest block's clocks over the launch's time, so a little low: a launch also
    takes time before and after its blocks. "TFLOP/s long" and "pJ/FLOP" are of launches that follow
    each other for 0.4 s; NVML's counter makes the energy good to some 5 %.
    """
    seconds, clocks, blocks = row["ms"] / 1e3, row["clocks"], row["blocks"]
    rates = {"GHz": clocks / seconds / 1e9}
    if "bytes" in row:
        rates["TB/s"] = row["bytes"] / seconds / 1e12
        rates["B/clk/SM"] = row["bytes"] / blocks / clocks
    if row.get("flops"):
        rates["TFLOP/s"] = row["flops"] / seconds / 1e12
        rates["FLOP/clk/SM"] = row["flops"] / blocks / clocks
    if "sustained_ms" in row:
        rates["TFLOP/s long"] = row["flops"] / row["sustained_ms"] / 1e9
    if row.get("joules", -1) > 0:
        rates["pJ/FLOP"] = row["joules"] / row["flops"] * 1e12
    if "count" in row:
        # A wgmma has the tensor cores to itself; exponentials go through their units side by side.
        if row["probe"] == "exp2":
            rates["exp2/clk/SM"] = row["count"] / clocks
        else:
            name = {"loops": "clk/tile", "both": "clk/pair", "backward": "clk/pair"}.get(
                row["probe"], "clk/product"
            )
            rates[name] = clocks / row["count"]
    return row | rates


def case(row: Row) -> str:
    """What a row measured, in words."""
    probe = row["probe"]
    if probe == "loads":
        users = {0: "", 1: ", used once", 2: ", used twice"}[row["users"]]
        return f"d {row['d']}, {row['by']}, {row['footprint']:.0f} MB{users}"
    if probe == "reduce":
        shared = f"{row['sharers']} blocks to the same" if row["sharers"] > 1 else "each its own"
        return f"{row['tile_bytes'] >> 10} KiB, {row['footprint']:.0f} MB, {shared}"
    if probe == "both":
        return f"d {row['d']}, from {row['footprint']:.0f} MB into {2 * row['footprint']:.0f} MB"
    if probe == "loops":
        softmax = f"{row['tiles']} per softmax, {row['behind']} behind"
        turns = ", in turns" if row["turns"] else ""
        loads = "" if row["loads"] == "none" else f", {row['loads']} loads"
        return f"d {row['d']}, {row['consumers']} of Q in {row['q']}, {softmax}{turns}{loads}"
    if probe == "backward":
        return f"d {row['d']}, {row['loop']}{', loads' if row['loads'] else ''}"
    if probe == "wgmma":
        return f"m64n{row['n']}k16, A in {row['a']}, B {row['b']}"
    return "all multiprocessors"


def table(rows: list[Row]) -> str:
    """Rows of a group, one a line, columns aligned."""
    shown = [name for name in RATES if any(name in row for row in rows)]
    lines = [f"  {'':76s}{'ms':>9s}{'':7s}" + "".join(f"{name:>13s}" for name in shown)]
    for row in rows:
        if "error" in row:
            lines.append(f"  failed: {row['error']}")
            continue
        values = "".join(f"{row[name]:13.2f}" if name in row else f"{'-':>13s}" for name in shown)
        lines.append(f"  {case(row):76s}{row['ms']:9.3f} ±{row['spread']:<5.1%}{values}")
    return "\n".join(lines)


def main() -> None:
    """Compile, measure, print a table per group, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--compile", type=Path, metavar="FILE", help="compile to FILE and stop")
    parser.add_argument("--program", type=Path, metavar="FILE", help="run what --compile made")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    options = parser.parse_args()
    if options.compile:
        print(compile_program(find_nvcc(), options.compile) or f"compiled {options.compile}")
        return
    with tempfile.TemporaryDirectory() as folder:
        program = options.program.resolve() if options.program else Path(folder) / "ceilings"
        if not options.program:
            print(compile_program(find_nvcc(), program), file=sys.stderr, end="")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        command = ["bench/ceilings.py", *sys.argv[1:]]
        head = provenance(device, command=command, commit=options.commit)
        print(", ".join(f"{name} {value}" for name, value in head.items()))
        rows: list[Row] = []
        for group in options.only:
            rows += (mine := run(program, group))
            print(f"\n{group}: {GROUPS[group]}\n{table(mine)}", flush=True)
            write(options.out, head, rows, complete=group == options.only[-1])
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
