# SPDX-License-Identifier: Apache-2.0
"""Tables of measurements, in markdown, out of the JSON files that the benchmarks write.

usage: python bench/results_table.py bench/results/*.json --into bench/TABLES.md

Which benchmark wrote a file, its command says. Above each table stand the device, driver, versions,
commit, date and command. With ``--into`` the tables replace those of the run before, between two
marks; everything else in that file stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tables
import tables_clocks
import tables_options
import tables_plain
from vsa.measure.provenance import HEAD, read

BEGIN, END = "<!-- tables: bench/results_table.py -->", "<!-- end of tables -->"
SETTINGS = ("diffusers", "backend", "compiled")
"""What is said above a table besides the head, where a file has it."""
BENCHMARKS: dict[str, tuple[str, Callable[[Sequence[Any]], Iterator[str]]]] = {
    "vsa bench": ("The whole operation beside dense attention", tables.bench),
    "vsa train": ("Training side by side", tables.train),
    "vsa wan": ("Wan2.1, dense against sparse", tables.wan),
    "vsa check": ("Parity on the grids of models", tables.check),
    "bench/peers.py": ("Our kernels beside others", tables.peers),
    "bench/coarse_select.py": ("Coarse stage, select and the whole", tables.coarse_select),
    "bench/ceilings.py": ("Ceilings", tables.ceilings),
    "bench/host.py": ("Host time, and what it leaves of the speed-up", tables.host),
    "bench/host_parts.py": ("Where the time of a call goes", tables.host_parts),
    "bench/sub_blocks.py": ("Scores by sub-blocks beside the mean's", tables_options.sub_blocks),
    "bench/tail.py": ("What a tail adds to a call", tables_options.tail),
    "bench/low_precision.py": ("The fine stage in eight bits", tables_options.low_precision),
    "bench/recall.py": ("What budgets keep of trained models", tables_options.recall),
    "bench/parallel.py": ("Ulysses on several GPUs", tables.parallel),
    "bench/masks.py": ("What a training mask costs", tables_plain.plain),
    "bench/streaming.py": ("A step over a cache", tables_plain.plain),
    "bench/host_layers.py": ("FastVideo's calls on its kernels and on ours", tables_plain.plain),
    "bench/host_power.py": (
        "The fine kernel over padded tiles, rested and hot",
        tables_plain.plain,
    ),
    "bench/work_tile_clocks.py": (
        "Clocks of a work tile of the forward kernel",
        tables_clocks.work_tile_clocks,
    ),
    "bench/training_parts.py": ("Kernels of a training step", tables_plain.plain),
    "bench/one_pass.py": ("The backward in one pass and in two", tables_plain.plain),
    "bench/precision.py": ("What eight bits change in trained models", tables_plain.plain),
    "bench/schedules.py": ("Budgets that change over denoising steps", tables_plain.plain),
}
"""Titles and tables by the beginning of the command."""
OLD_NAMES = {"bench/routing.py": "bench/coarse_select.py"}
"""What scripts were called when files in bench/results were written."""


def benchmark(command: str) -> str:
    """Which of ``BENCHMARKS`` a command is.

    Raises:
        ValueError: none of them.
    """
    first, second, *_ = [*command.split(), "", ""]
    name = f"vsa {second}" if first == "vsa" else OLD_NAMES.get(first, first)
    if name not in BENCHMARKS:
        raise ValueError(f"command must be one of {', '.join(BENCHMARKS)}, but it is {command!r}")
    return name


def section(path: Path) -> str:
    """Title, origin and tables of a file.

    Raises:
        ValueError: a file that no benchmark here writes.
    """
    found = read(path)
    try:
        title, of_rows = BENCHMARKS[benchmark(found["command"])]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [x for x in (*HEAD, *SETTINGS) if x != "command" and found.get(x) is not None]
    about = ", ".join(f"{name} {found[name]}" for name in names)
    parts = [f"## {title}: {path.stem}", f"`{found['command']}`: {about}."]
    if found["rows"]:
        parts += of_rows(found["rows"])
    return "\n\n".join(parts).replace("\n\n- ", "\n- ")


def insert(text: str, new: str) -> str:
    """A document with its tables replaced, or appended where it has none.

    Raises:
        ValueError: a document with the first mark and without the last.
    """
    before, mark, rest = text.partition(BEGIN)
    if not mark:
        return f"{text.rstrip()}\n\n{BEGIN}\n\n{new}\n\n{END}\n"
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the document must have {END!r} after {BEGIN!r}, but has not")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main() -> None:
    """Read JSON, print markdown or put it into a document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a markdown file to change")
    options = parser.parse_args()
    try:
        new = "\n\n".join(section(path) for path in options.files)
        if options.into is None:
            print(new)
        else:
            options.into.write_text(insert(options.into.read_text(), new))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
