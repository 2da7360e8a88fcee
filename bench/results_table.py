# SPDX-License-Identifier: Apache-2.0
"""Tables of RESULTS.md out of the JSON files that the benchmarks write.

usage: python bench/results_table.py peers.json fine.json ceilings.json [--into bench/RESULTS.md]

Knows what bench/peers.py, fine.py, routing.py, grids.py, ceilings.py, parallel.py, ``vsa bench
--json`` and ``vsa wan --json`` write, by its rows. Above each table stand device, driver, versions,
commit and date, as far as the file names them. With ``--into`` the tables replace those of the run
before, between two marks; everything else in that file stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ceilings import RATES
from ceilings import case as ceiling_case
from comparison.report import layer
from comparison.worker import KERNELS

Row = dict[str, Any]
BEGIN, END = "<!-- tables: bench/results_table.py -->", "<!-- end of tables -->"
NUMBER = r"([\d.]+%?( ±[\d.]+%)?)?"
FACTS = (
    "device",
    "machine",
    "driver",
    "limits",
    "torch",
    "diffusers",
    "cuda",
    "cudnn",
    "vsa",
    "backend",
    "compiled",
    "commit",
    "date",
)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose numbers, all columns but those of words, are aligned to the right."""
    body = [list(row) for row in rows]
    lines = [list(head), [_rule(column) for column in zip(*body, strict=True)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rule(column: Sequence[str]) -> str:
    return "---:" if all(re.fullmatch(NUMBER, text) for text in column) else "---"


def peers(rows: Sequence[Row]) -> Iterator[str]:
    """A table per direction, and what was not measured."""
    head = "head_dim", "layer", "lists", "shared", "kernel", "ms", "TFLOP/s", "share", "speed-up"
    for direction in ("forward", "backward"):
        mine = [row for row in rows if "tflops" in row and row["direction"] == direction]
        if not mine:
            continue
        ordered = sorted(mine, key=lambda row: (str(layer(row)), row["lists"] or "", row["ms"]))
        yield f"{direction.capitalize()}:"
        state = "MHz", "W", "pJ/FLOP", "power-capped", "rested: TFLOP/s"
        yield markdown((*head, *state), (peer_cells(row) for row in ordered))
    names = [
        KERNELS[x].title for x in sorted({row["baseline"] for row in rows if "baseline" in row})
    ]
    if names:
        yield f"Share and speed-up are over {' and '.join(names)} in the same run."
    for row in rows:
        if reason := row.get("skipped") or row.get("failed"):
            about = [KERNELS[row["kernel"]].title]
            if "grid" in row:
                about += [_grid(row), f"d {row['head_dim']}", row.get("direction", "all")]
            yield f"- Not measured: {', '.join(about)}: {reason}"


def peer_cells(row: Row) -> list[str]:
    """One row of bench/peers.py."""
    gpu = row["gpu"]
    return [
        str(row["head_dim"]),
        f"{_grid(row)}, {row['heads']} heads",
        row["lists"] or "dense",
        f"{row['shared']:.0%}" if row["lists"] else "",
        KERNELS[row["kernel"]].title,
        f"{row['ms']:.3f} ±{row['spread']:.1%}",
        f"{row['tflops']:.3g}",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{row['speedup']:.2f}" if "speedup" in row else "",
        f"{gpu['clock']:.0f}" if gpu else "",
        f"{gpu['power']:.0f}" if gpu else "",
        f"{gpu['power'] / row['tflops']:.2f}" if gpu else "",
        f"{gpu['power_capped']:.0%}" if "power_capped" in gpu else "",
        f"{row['tflops'] * row['ms'] / row['rested_ms']:.3g}" if "rested_ms" in row else "",
    ]


def _grid(row: Row) -> str:
    return "x".join(map(str, row["grid"]))


def fine(rows: Sequence[Row]) -> Iterator[str]:
    """A table per direction."""
    head = "head_dim", "grid", "lists", "shared", "ms", "TFLOP/s", "cuDNN dense TFLOP/s", "share"
    for direction in dict.fromkeys(row["direction"] for row in rows):
        yield f"{direction.capitalize()}:"
        mine = [row for row in rows if row["direction"] == direction]
        yield markdown(
            head,
            (
                [
                    str(row["head_dim"]),
                    _grid(row),
                    row["lists"],
                    f"{row['shared']:.0%}",
                    f"{row['ms']:.3f}",
                    f"{row['tflops']:.0f}",
                    f"{row['dense_tflops']:.0f}",
                    f"{row['share']:.0%}",
                ]
                for row in mine
            ),
        )


def routing(rows: Sequence[Row]) -> Iterator[str]:
    """One table: time, bytes to be moved at least, bytes of results, and the most held at once."""
    yield markdown(
        ("video", "stage", "computed by", "ms", "GB moved", "results, MiB", "peak, MiB"),
        (
            [
                row["shape"],
                row["stage"],
                row["what"],
                f"{row['ms']:.3f}",
                f"{row['moved'] / 1e9:.2f}" if row["moved"] else "",
                *(f"{row[name] / 2**20:,.1f}" for name in ("results", "peak")),
            ]
            for row in rows
        ),
    )


def grids(rows: Sequence[Row]) -> Iterator[str]:
    """One table: the worst multiples of the yardsticks' errors."""
    names = [name for name in ("out", "lse", "dq", "dk", "dv") if name in rows[0]]
    yield markdown(
        ("grid", "head_dim", "dtype", *names, "verdict"),
        (
            [
                row["name"],
                str(row["head_dim"]),
                row["dtype"],
                *(f"{row[name]:.2f}" for name in names),
                f"failed: {', '.join(row['failed'])}" if row["failed"] else "ok",
            ]
            for row in rows
        ),
    )


def ceilings(rows: Sequence[Row]) -> Iterator[str]:
    """One table, with the rates that any row has."""
    names = [name for name in RATES if any(name in row for row in rows)]
    yield markdown(
        ("measured", "ms", *names),
        (
            [f"{row['probe']}: {ceiling_case(row)}", f"{row['ms']:.3f}"]
            + [f"{row[name]:.2f}" if name in row else "" for name in names]
            for row in rows
            if "error" not in row
        ),
    )
    for row in rows:
        if "error" in row:
            yield f"- Not measured: {row['group']}: {row['error']}"


def wan(sizes: Sequence[Row]) -> Iterator[str]:
    """What a step of Wan takes, dense and sparse, and what of it is what; one table."""
    parts = "linear layers", "norms", "cross-attention"
    yield markdown(
        (
            *("video", "tiles kept", "run", "a step, ms", "self-attention, ms"),
            *(f"{part}, ms" for part in parts),
            *("steps, s", "speed-up", "beyond weights, GiB"),
        ),
        (
            [
                size["size"],
                f"{size['kept']} of {size['tiles']}",
                run,
                *(
                    f"{seconds * 1e3:.1f}"
                    for seconds in (
                        size[run]["median"],
                        *(size[run]["stages"][part] for part in ("attention", *parts)),
                    )
                ),
                f"{len(size[run]['steps'])} in {size[run]['total']:.2f}",
                f"{size['dense']['total'] / size[run]['total']:.2f}",
                f"{size[run]['memory'] / 2**30:.2f}",
            ]
            for size in sizes
            for run in ("dense", "sparse")
        ),
    )


def sweep(rows: Sequence[Row]) -> Iterator[str]:
    """The whole operation beside dense attention, by layer and share of the tiles; one table."""
    yield markdown(
        (
            *("layer", "heads", "head_dim", "kept", "direction", "dense, ms", "sparse, ms"),
            *("speed-up", "dense TFLOP/s", "sparse TFLOP/s", "dense, MHz, W", "sparse, MHz, W"),
        ),
        (
            [
                row["shape"],
                str(row["heads"]),
                str(row["head_dim"]),
                f"{row['kept']} of {row['tiles']}" + _lists(row),
                row["direction"],
                *(
                    f"{row[kind] * 1e3:,.3f} ±{row[f'{kind}_spread']:.1%}"
                    for kind in ("dense", "sparse")
                ),
                f"{row['dense'] / row['sparse']:.2f}",
                *(f"{row[f'{kind}_tflops']:.0f}" for kind in ("dense", "sparse")),
                *(_clock_and_power(row[f"{kind}_gpu"]) for kind in ("dense", "sparse")),
            ]
            for row in rows
        ),
    )


def _lists(row: Row) -> str:
    return "" if row["lists"] == "chosen" else f", {row['lists'].removesuffix('.pt')}"


def _clock_and_power(gpu: dict[str, float]) -> str:
    return f"{gpu['clock']:.0f}, {gpu['power']:.0f}" if gpu else "-"


def parallel(rows: Sequence[Row]) -> Iterator[str]:
    """One GPU and several, and what they exchange; a column for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        speed = f", {row['sent'] / row['ms'] / 1e6:.0f} GB/s" if row["sent"] else ""
        text = f"{row['ms']:.3f} ±{row['spread']:.1%}{speed}"
        found.setdefault((row["what"], row["ranks"]), {})[row["case"]] = text
    yield markdown(
        ("ms", "GPUs", *cases),
        ([what, str(ranks), *(of[case] for case in cases)] for (what, ranks), of in found.items()),
    )


KINDS = {
    "dense_kernels": ("Wan2.1, dense against sparse", wan),
    "kernel": ("Our kernels beside those of others", peers),
    "sent": ("Ulysses on several GPUs", parallel),
    "dense_spread": ("The whole operation beside dense attention", sweep),
    "dense_tflops": ("Fine stage beside cuDNN", fine),
    "stage": ("Stages", routing),
    "dtype": ("Parity on the grids of models", grids),
    "probe": ("Ceilings", ceilings),
}
"""By a field that the rows of one benchmark alone have."""


def section(path: Path) -> str:
    """Title, facts and tables of a file.

    Raises:
        ValueError: rows that no benchmark here writes.
    """
    found = json.loads(path.read_text())
    rows = found.get("rows") or found.get("sizes") or []
    fields = {field for row in rows for field in row}
    for field, (title, tables) in KINDS.items():
        if field in fields:
            about = ", ".join(f"{name} {found[name]}" for name in FACTS if name in found)
            command = f" `{found['command']}`" if "command" in found else ""
            parts = [f"### {title}", f"{about}.{command} Raw: {path.name}.", *tables(rows)]
            return "\n\n".join(parts).replace("\n\n- ", "\n- ")
    have = ", ".join(sorted(fields)) or "no fields"
    raise ValueError(f"{path} must be a benchmark's JSON, but its rows have {have}")


def insert(text: str, tables: str) -> str:
    """A document with its tables replaced, or appended where it has none."""
    before, mark, rest = text.partition(BEGIN)
    if not mark:
        return f"{text.rstrip()}\n\n{BEGIN}\n\n{tables}\n\n{END}\n"
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the document must have {END!r} after {BEGIN!r}, but has not")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """Read JSON, print markdown or put it into a document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a markdown file to change")
    options = parser.parse_args()
    try:
        tables = "\n\n".join(section(path) for path in options.files)
        if options.into is None:
            print(tables)
        else:
            options.into.write_text(insert(options.into.read_text(), tables))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
