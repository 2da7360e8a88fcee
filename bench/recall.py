# SPDX-License-Identifier: Apache-2.0
"""What a budget keeps of a trained model's attention: by score, by head budgets, with a tail.

usage: python bench/recall.py pair/weights-vsa.pt pair/weights-full.pt --out recall.json

Takes weights that ``vsa train`` has left, or recordings of queries, keys and values
(bench/recall_sources.py says what is in them; --keep writes one). Runs held-out clips, and measures
in every layer, at every budget:

- mass recall: the share of dense attention on the kept tiles, the mean and the 5th percentile over
  all heads of all layers;
- output error: the relative L2 distance to dense attention in fp64, the mean and the 95th
  percentile; without gates, and with those of a model that has some;
- held-out loss of the whole model when all of its layers keep so many tiles. A model that was
  trained dense is made sparse without training.

Tiles are chosen by mean scores, by those of sub-blocks, and by their true mass (oracle); with as
many tiles for every head (uniform), and with budgets that ``vsa.calibrate`` finds on training clips
at the same total, for the worst head (calibrated), for the mean and for the error of the output
(found without a tail); without and with a tail where this version has it. On a GPU the time of
attention in all layers stands beside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import vsa
from recall_measures import (
    AIMS,
    ORACLE,
    SCORES,
    UNIFORM,
    Budgets,
    Measured,
    Way,
    calibrated,
    losses,
    measured,
    timed,
)
from recall_sources import Source, open_source, record
from vsa.measure.machine import machine
from vsa.measure.provenance import provenance, write
from vsa.values import checks

TOPKS = (0.05, 0.1, 0.125, 0.25)
Row = dict[str, Any]
Losses = tuple[Mapping[Way, Tensor], Mapping[str, Tensor]]


def rows_of(
    source: Source, found: Mapping[Way, Measured], budgets: Budgets, lost: Losses
) -> list[Row]:
    """A row for each way: means and percentiles over all heads of all layers."""
    heads_of_layers = next(iter(found.values())).recall.shape
    clip = next(iter(source.held_out)) if torch.cuda.is_available() else {}
    rows = []
    for way, numbers in found.items():
        calibrated_heads = budgets[way.score, way.topk]
        of_way = calibrated_heads[way.heads if way.heads in AIMS else next(iter(AIMS))]
        n = of_way.num_tiles
        row = {
            "source": source.name,
            **way._asdict(),
            "tiles": of_way.uniform,
            "num_tiles": n,
            "recall": numbers.recall.mean().item(),
            "recall_p5": numbers.recall.quantile(0.05).item(),
            "recall_least": numbers.recall.min().item(),
            "error": numbers.error.mean().item(),
            "error_p95": numbers.error.quantile(0.95).item(),
            "error_most": numbers.error.max().item(),
            "recall_by_layer": numbers.recall.mean(1).tolist(),
            "error_by_layer": numbers.error.mean(1).tolist(),
        }
        if way in lost[0]:
            row["loss"] = lost[0][way].mean().item()
            row["loss_clips"] = lost[0][way].tolist()
        if not (way.tail or way.gates):
            each = dict(of_way.layers)
            if way.heads == UNIFORM:
                even = vsa.LayerBudget((of_way.uniform,) * heads_of_layers[1], n)
                each = dict.fromkeys(each, even)
            row["tiles_by_head"] = [list(budget.counts) for budget in each.values()]
            row["attention_ms"] = timed(clip, source.grid, each, way.score) if clip else None
        rows.append(row)
    return rows


def one(rows: list[Row], **wanted: object) -> Row | None:
    """The row of a way, if there is one."""
    return next((x for x in rows if all(x[key] == value for key, value in wanted.items())), None)


def gap_closed(rows: list[Row], topk: float, score: str) -> float | None:
    """Share of the distance from mean scores' recall to the oracle's that a score closes."""
    at: Row = {"topk": topk, "heads": UNIFORM, "tail": False, "gates": False}
    low, high, here = (one(rows, score=name, **at) for name in ("mean", ORACLE, score))
    if low is None or high is None or here is None or high["recall"] <= low["recall"]:
        return None
    return float((here["recall"] - low["recall"]) / (high["recall"] - low["recall"]))


def table(source: Source, rows: list[Row]) -> Table:
    """Recall and error of a source."""
    gates = any(row["gates"] for row in rows)
    tails = sorted({row["tail"] for row in rows})
    found = Table(title=f"{source.name}: {source.about.get('clips', '?')} held-out clips")
    for column in ("kept", "score", "heads"):
        found.add_column(column, no_wrap=True)
    columns = ["recall", "5th pct", "least"]
    columns += ["error", "error, tail"][: len(tails)]
    columns += ["gated", "gated, tail"][: len(tails)] if gates else []
    columns += ["loss", "loss, tail"][: len(tails)]
    for column in [*columns, "ms"]:
        found.add_column(column, justify="right")
    for row in rows:
        if row["tail"] or row["gates"]:
            continue
        way = {name: row[name] for name in ("topk", "score", "heads")}
        errors = [
            one(rows, **way, tail=tail, gates=behind)
            for behind in (False, True)[: 1 + gates]
            for tail in tails
        ]
        cells = [f"{row['topk']:.1%}", row["score"], row["heads"]]
        cells += [f"{row[key]:.1%}" for key in ("recall", "recall_p5", "recall_least")]
        cells += ["" if each is None else f"{each['error']:.3f}" for each in errors]
        for tail in tails:
            with_loss = [one(rows, **way, tail=tail, gates=each) or {} for each in (True, False)]
            loss = next((each["loss"] for each in with_loss if "loss" in each), None)
            cells.append("" if loss is None else f"{loss:.4f}")
        ms = row["attention_ms"]
        found.add_row(*cells, "" if ms is None else f"{ms:.2f}")
    found.caption = (
        "Recall: share of dense attention on the kept tiles; mean, 5th percentile and least of all "
        "heads. Error: relative L2 to dense attention in fp64, the mean. Calibrated: tiles shared "
        "out over heads at the same total, for the worst head, the mean or the output's error, on "
        "training clips."
    )
    if losses := source.about.get("losses"):
        found.caption += " Loss: held out, of the whole model; " + ", ".join(
            f"{loss:.4f} {'as it was ' if name == 'trained' else 'with '}{name}"
            for name, loss in losses.items()
        )
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "sources", nargs="+", type=Path, metavar="FILE", help="weights or recordings"
    )
    found.add_argument("--out", type=Path, required=True, metavar="JSON")
    found.add_argument("--plot", type=Path, metavar="PNG", help="draw them (needs matplotlib)")
    found.add_argument("--topk", nargs="+", type=float, default=TOPKS, help="shares of the tiles")
    found.add_argument("--clips", type=int, default=16, help="held-out clips")
    found.add_argument("--calibrate", type=int, default=4, help="clips to calibrate on")
    found.add_argument("--tiles", type=int, default=64, help="query tiles to calibrate by")
    found.add_argument("--real", type=float, help="share of real clips; by default as in training")
    found.add_argument("--budgets", type=Path, metavar="DIR", help="write calibrated budgets there")
    found.add_argument("--keep", type=Path, metavar="PT", help="write a recording of the source")
    found.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return found


def checked(options: argparse.Namespace, refuse: Any) -> None:
    """What can be refused before work."""
    for path in filter(None, (options.out, options.plot, options.keep, options.budgets)):
        if not path.absolute().parent.is_dir():
            refuse(f"{path} must be in a folder that exists")
    if options.keep and len(options.sources) > 1:
        refuse("--keep records one source, but several are given")
    if options.plot and find_spec("matplotlib") is None:
        refuse("--plot needs matplotlib, which the extra demo brings")
    try:
        for topk in options.topk:
            checks.share("--topk", topk)
        for name in ("clips", "calibrate", "tiles"):
            checks.integer(f"--{name}", getattr(options, name), at_least=1)
    except (ValueError, TypeError) as error:
        refuse(str(error))


def main() -> None:
    """Measure, print, write, draw."""
    asked = parser()
    options = asked.parse_args()
    checked(options, asked.error)
    gpu = torch.cuda.is_available() and not options.cpu
    device, console = torch.device("cuda", 0) if gpu else torch.device("cpu"), Console(width=120)
    head = provenance(device, command=["bench/recall.py", *sys.argv[1:]])
    head |= {"scores": list(SCORES), "sources": []}
    rows: list[Row] = []
    for path in options.sources:
        try:
            source = open_source(path, device, options.clips, options.calibrate, options.real)
        except (ValueError, ModuleNotFoundError) as error:
            asked.error(str(error))
        if options.keep:
            record(options.keep, source)
        own, budgets = look_at(source, options, console)
        rows += own
        about = {"name": source.name, "grid": list(source.grid.shape), **source.about}
        head["sources"].append(about)
        write(options.out, head, rows, complete=path == options.sources[-1])
        console.print(table(source, own))
        for score in (name for name in SCORES if name not in ("mean", ORACLE)):
            shares = [
                f"{share:.0%} at {topk:.1%} of the tiles"
                for topk in options.topk
                if (share := gap_closed(own, topk, score)) is not None
            ]
            console.print(f"{score} closes of mean's distance to oracle: {', '.join(shares)}")
        if options.budgets:
            options.budgets.mkdir(exist_ok=True)
            for (score, topk), each in budgets.items():
                for heads, aim in AIMS.items():
                    name = f"{source.name}-{score}-{topk:g}-{aim}.json".replace(" ", "-")
                    each[heads].save(options.budgets / name)
    if options.plot:
        from recall_picture import draw

        draw(head, rows, options.plot)
    console.print(f"{machine(device)}; written to {options.out}")


def look_at(
    source: Source, options: argparse.Namespace, console: Console
) -> tuple[list[Row], Budgets]:
    """Calibrate and measure one source."""
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{source.name}: clips", total=None)
        budgets = calibrated(
            source, list(options.topk), options.tiles, lambda: progress.advance(task)
        )
        found = measured(source, budgets, lambda: progress.advance(task))
        lost = losses(source, budgets, lambda: progress.advance(task))
        if lost[1]:
            source.about["losses"] = {name: x.mean().item() for name, x in lost[1].items()}
        return rows_of(source, found, budgets, lost), budgets


if __name__ == "__main__":
    main()
