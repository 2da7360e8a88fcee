# SPDX-License-Identifier: Apache-2.0
"""The tables of each benchmark, in markdown, out of the rows that it writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from ceilings import RATES
from ceilings import case as ceiling_case
from comparison.report import layer
from comparison.worker import title

Row = dict[str, Any]
NUMBER = r"([\d.,]+%?( ±[\d.]+%)?)?"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose numbers, all columns but those of words, are aligned to the right."""
    body = [list(row) for row in rows]
    lines = [list(head), [_rule(column) for column in zip(*body, strict=True)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rule(column: Sequence[str]) -> str:
    return "---:" if all(re.fullmatch(NUMBER, text) for text in column) else "---"


def peers(rows: Sequence[Row]) -> Iterator[str]:
    """A table per direction, and what was not measured."""
    head = "head_dim", "layer", "pattern", "shared", "kernel", "ms", "TFLOP/s", "share", "speed-up"
    for direction in ("forward", "backward"):
        mine = [row for row in rows if "tflops" in row and row["direction"] == direction]
        if not mine:
            continue
        ordered = sorted(mine, key=lambda row: (str(layer(row)), row["pattern"] or "", row["ms"]))
        yield f"{direction.capitalize()}:"
        state = "MHz", "W", "pJ/FLOP", "power-capped", "rested: TFLOP/s"
        yield markdown((*head, *state), (peer_cells(row) for row in ordered))
    names = [title(x) for x in sorted({row["baseline"] for row in rows if "baseline" in row})]
    if names:
        yield f"Share and speed-up are over {' and '.join(names)} in the same run."
    for row in rows:
        if "plan_ms" in row and "tflops" in row:
            what = f"{title(row['kernel'])}, {_grid(row)}, d {row['head_dim']}"
            what += f", {row['pattern']}, {row['direction']}"
            yield f"- Planned before the clock started: {what}: {row['plan_ms']:.3g} ms"
    for row in rows:
        if reason := row.get("skipped") or row.get("failed"):
            about = [title(row["kernel"])]
            if "grid" in row:
                about += [_grid(row), f"d {row['head_dim']}", row.get("direction", "all")]
            yield f"- Not measured: {', '.join(about)}: {reason}"


def peer_cells(row: Row) -> list[str]:
    """One row of bench/peers.py."""
    gpu = row["gpu"]
    return [
        str(row["head_dim"]),
        f"{_grid(row)}, {row['heads']} heads",
        row["pattern"] or "dense",
        f"{row['shared']:.0%}" if row["pattern"] else "",
        title(row["kernel"]),
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


def coarse_select(rows: Sequence[Row]) -> Iterator[str]:
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


def check(rows: Sequence[Row]) -> Iterator[str]:
    """One table: the worst errors as multiples of their yardsticks'."""
    names = list(rows[0]["multiples"])
    yield markdown(
        ("shape", "head_dim", "dtype", "backend", *names, "verdict"),
        (
            [
                row["shape"],
                str(row["head_dim"]),
                row["dtype"],
                row["backend"],
                *(f"{row['multiples'][name]:.2f}" for name in names),
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
    """What a step of Wan takes, and what of it is what; one table.

    Runs are dense and sparse, and with low precision the native sparse one between them.
    """
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
                "sparse, low precision" if run == "sparse" and size.get("native") else run,
                *(
                    f"{ms:.1f}"
                    for ms in (
                        size[run]["step_ms"],
                        *(size[run]["stages_ms"][part] for part in ("attention", *parts)),
                    )
                ),
                f"{len(size[run]['steps_ms'])} in {size[run]['total_ms'] / 1e3:.2f}",
                f"{size['dense']['total_ms'] / size[run]['total_ms']:.2f}",
                f"{size[run]['memory'] / 2**30:.2f}",
            ]
            for size in sizes
            for run in ("dense", "native", "sparse")
            if size.get(run)
        ),
    )


def bench(rows: Sequence[Row]) -> Iterator[str]:
    """The whole operation beside dense attention, by layer and share of the tiles; one table."""
    first = rows[0] if rows else {}
    hosts, ways = list(first.get("host_ms", {})), list(first.get("ways_ms", {}))
    yield markdown(
        (
            *("layer", "heads", "head_dim", "kept", "direction", "dense, ms", "sparse, ms"),
            *("speed-up", "dense TFLOP/s", "sparse TFLOP/s", "dense, MHz, W", "sparse, MHz, W"),
            *([f"host: {', '.join(hosts)}, us"] if hosts else []),
            *(f"{way}, ms" for way in ways),
        ),
        (
            [
                row["shape"],
                str(row["heads"]),
                str(row["head_dim"]),
                f"{row['kept']} of {row['tiles']}" + _pattern(row),
                row["direction"],
                *(
                    f"{row[f'{kind}_ms']:,.3f} ±{row[f'{kind}_spread']:.1%}"
                    for kind in ("dense", "sparse")
                ),
                f"{row['dense_ms'] / row['sparse_ms']:.2f}",
                *(f"{row[f'{kind}_tflops']:.0f}" for kind in ("dense", "sparse")),
                *(_clock_and_power(row[f"{kind}_gpu"]) for kind in ("dense", "sparse")),
                *([", ".join(f"{row['host_ms'][x] * 1e3:.0f}" for x in hosts)] if hosts else []),
                *(f"{row['ways_ms'][way]:.3f}" for way in ways),
            ]
            for row in rows
        ),
    )


def _pattern(row: Row) -> str:
    return "" if row["pattern"] == "chosen" else f", {row['pattern'].removesuffix('.pt')}"


def _clock_and_power(gpu: dict[str, float]) -> str:
    return f"{gpu['clock']:.0f}, {gpu['power']:.0f}" if gpu else "-"


def parallel(rows: Sequence[Row]) -> Iterator[str]:
    """For every shape and case, one GPU and several; a second table of parts and the host."""
    calls = [row for row in rows if row["mode"] not in ("part", "host")]
    of_one = {
        (row["shape"], row["case"], row["mode"], row["what"]): row["ms"]
        for row in calls
        if row["ranks"] == 1
    }
    found = []
    for row in calls:
        key = row["shape"], row["case"], row["mode"], row["what"]
        gain = f"{of_one[key] / row['ms']:.2f}" if key in of_one and row["ranks"] > 1 else "-"
        found.append([*key, str(row["ranks"]), row["way"] or "-", _ranks_ms(row), gain])
    head = "shape", "shares", "mode", "call", "GPUs", "way", "ms", "times one GPU"
    yield markdown(head, found)
    others = [row for row in rows if row["mode"] in ("part", "host")]
    if others:
        yield markdown(
            ("shape", "GPUs", "part", "ms", "each rank, ms", "GB/s from each"),
            (
                [
                    row["shape"],
                    str(row["ranks"]),
                    row["what"] if row["mode"] == "part" else f"host, {row['what']}",
                    _ranks_ms(row),
                    ", ".join(f"{ms:.3f}" for ms in row["per_rank_ms"]),
                    f"{row['sent'] / row['ms'] / 1e6:.0f}" if row["sent"] else "-",
                ]
                for row in others
            ),
        )


def _ranks_ms(row: Row) -> str:
    return f"{row['ms']:.3f} ±{row['spread']:.1%}"


def host(rows: Sequence[Row]) -> Iterator[str]:
    """A table of single layers and one of training steps, the builds below each other."""
    layers = [row for row in rows if "layer" in row]
    one_thread = "both one thread host us"
    has_one_thread = any(one_thread in row for row in layers)
    if layers:
        head = ["layer", "attention", "build", "forward, ms", "in a graph", "host, us"]
        head += ["forward and backward, ms", "in a graph", "host, us"]
        head += ["in one thread, host us"] * has_one_thread
        yield markdown(
            head,
            (
                [
                    row["layer"],
                    row["what"],
                    row["build"],
                    *_times(row, "forward"),
                    *_times(row, "both"),
                    *([_number(row, one_thread, 0)] * has_one_thread),
                ]
                for row in layers
            ),
        )
    if stacks := [row for row in layers if "forward stack eager ms" in row]:
        ways = [(direction, way) for direction in ("forward", "both") for way in WAYS]
        yield markdown(
            ["calls in a row", "attention", *(f"{d}, {way}: ms, host us" for d, way in ways)],
            (
                [
                    row["layer"],
                    row["what"],
                    *(
                        f"{row[f'{d} stack {way} ms']:.3f}, {row[f'{d} stack {way} host us']:.0f}"
                        for d, way in ways
                    ),
                ]
                for row in stacks
            ),
        )
    if steps := [row for row in rows if "model" in row]:
        has_graph = any("step graph ms" in row for row in steps)
        yield markdown(
            ["model", "attention", "build", "training step, ms", *["in a graph"] * has_graph],
            (
                [
                    row["model"],
                    row["what"],
                    row["build"],
                    _number(row, "step ms", 1),
                    *[_number(row, "step graph ms", 1)] * has_graph,
                ]
                for row in steps
            ),
        )


WAYS = ("eager", "compiled")


def host_parts(rows: Sequence[Row]) -> Iterator[str]:
    """Microseconds of the host by part, and below it of the GPU by kernel."""
    layers = [[row["layer"], row["what"]] for row in rows]
    parts = [key for key in rows[0] if key.endswith("host us")]
    yield markdown(
        ["layer", "attention", *parts],
        (
            [*layer, *(f"{row[part]:.0f}" for part in parts)]
            for layer, row in zip(layers, rows, strict=True)
        ),
    )
    of_kernels = [
        {_kernel(name): time for name, time in row.get("kernels", {}).items()} for row in rows
    ]
    if names := list(dict.fromkeys(name for kernels in of_kernels for name in kernels)):
        yield markdown(
            ["layer", "attention", *(f"{name}, us" for name in names)],
            (
                [*layer, *(_number(kernels, name, 1) for name in names)]
                for layer, kernels in zip(layers, of_kernels, strict=True)
            ),
        )


def _kernel(symbol: str) -> str:
    """A kernel's name in words: of ``persistent_kernel<vsa::FineForward<...>>``, fine forward."""
    of_class = re.search(r"persistent_kernel<vsa::(\w+)", symbol)
    if of_class:
        return re.sub(r"(?<!^)([A-Z])", r" \1", of_class[1]).lower()
    of_function = re.search(r"(\w+)_kernel\b", symbol)
    return symbol[:40] if of_function is None else of_function[1].replace("_", " ")


def train(rows: Sequence[Row]) -> Iterator[str]:
    """Held-out loss, and what it took, at every evaluation of every kind."""
    yield markdown(
        ["step", "kind", "held-out loss", "FLOPs", "seconds", "recall", "density"],
        (
            [
                f"{row['step']:,}",
                row["kind"],
                f"{row['held_out']:.4f}",
                f"{row['flops']:.3g}",
                f"{row['train_ms'] / 1e3:.1f}",
                f"{fmean(row['recall']):.0%}",
                f"{row['density']:.1%}",
            ]
            for row in rows
        ),
    )


def _times(row: Row, direction: str) -> list[str]:
    return [
        _number(row, f"{direction} ms", 3),
        _number(row, f"{direction} graph ms", 3),
        _number(row, f"{direction} host us", 0),
    ]


def _number(row: Row, key: str, digits: int) -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.{digits}f}"
