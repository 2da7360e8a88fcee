# SPDX-License-Identifier: Apache-2.0
"""Which steps of a denoising loop need the tiles: schedules of equal cost, on trained models.

usage: python bench/schedules.py pair/weights-vsa.pt pair/weights-full.pt --out schedules.json

Takes weights that ``vsa train`` has left. Each way runs a loop from the same noise, with one budget
for all layers that changes over the steps, and the same tiles in all of the loop:

uniform     the same share at every step
first dense the first steps dense, the others with what is left
last dense  the same, turned round
falling     a share that falls in a straight line
rising      one that rises

What counts is how far the video at the end is from the dense loop's, |x - x_dense| / |x_dense|.
Beside it stands the held-out loss by time, sparse less dense: which times need the tiles when each
step is looked at alone. A model that was trained dense is made sparse without training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from precision_measures import denoised, difference
from recall_sources import Trained, open_source
from vsa.measure.provenance import provenance, write
from vsa.training import flow
from vsa.training.model import VideoTransformer

LEAST = 0.03
"""Share of the tiles that every step keeps."""
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which losses are compared; 1 is noise, where a loop begins."""


def ways(share: float, steps: int) -> dict[str, list[float]]:
    """Shares of all steps by name, of the same sum."""
    few = max(LEAST, share / 2)
    dense = int((share - few) * steps / (1 - few))
    left = (share * steps - dense) / (steps - dense)
    most = min(1.0, 2 * share - LEAST)
    line = [most + (2 * share - 2 * most) * step / max(1, steps - 1) for step in range(steps)]
    first = [1.0] * dense + [left] * (steps - dense)
    return {
        "uniform": [share] * steps,
        "first dense": first,
        "last dense": first[::-1],
        "falling": line,
        "rising": line[::-1],
    }


@torch.no_grad()
def loops(
    trained: Trained, model: VideoTransformer, shares: Sequence[float], steps: int
) -> Iterator[dict[str, Any]]:
    """A row for each way and share."""

    def run(of_steps: Sequence[float]) -> torch.Tensor:
        with trained.autocast():
            return denoised(
                trained, model, steps, lambda step: model.set_topk(float(of_steps[step]))
            )

    dense = run([1.0] * steps)
    for share in shares:
        for name, of_steps in ways(share, steps).items():
            assert abs(sum(of_steps) / steps - share) < 1e-9
            by_step = difference(run(of_steps), dense)
            row: dict[str, Any] = {"what": "loop", "share": share, "schedule": name}
            yield row | {"to_dense": by_step[-1].item(), "shares": list(of_steps)}


@torch.no_grad()
def losses(
    trained: Trained, model: VideoTransformer, shares: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Held-out loss by time, and what leaving tiles out adds to it."""

    def loss(share: float, time: float) -> float:
        model.set_topk(share)
        with trained.autocast():
            each = [
                flow.clip_losses(model, x.video, x.noise, torch.full_like(x.time, time))
                for x in trained.held_out
            ]
        return torch.cat(each).double().mean().item()

    for time in TIMES:
        dense = loss(1.0, time)
        row: dict[str, Any] = {"what": "loss", "time": time, "dense": dense}
        yield row | {f"{share:g}": loss(share, time) - dense for share in shares}


def tables(name: str, rows: list[dict[str, Any]], shares: Sequence[float]) -> list[Table]:
    """Both kinds of rows."""
    of_loops = Table(title=f"{name}: distance to the dense loop's video", title_justify="left")
    of_losses = Table(title=f"{name}: loss at a time, less dense", title_justify="left")
    of_loops.add_column("schedule")
    for column in ("time", "dense"):
        of_losses.add_column(column)
    for share in shares:
        of_loops.add_column(f"{share:g}", justify="right")
        of_losses.add_column(f"{share:g}", justify="right")
    found = [row for row in rows if row["what"] == "loop"]
    for schedule in dict.fromkeys(row["schedule"] for row in found):
        each = [row["to_dense"] for row in found if row["schedule"] == schedule]
        of_loops.add_row(schedule, *(f"{value:.4f}" for value in each))
    for row in rows:
        if row["what"] == "loss":
            values = (f"{row[f'{share:g}']:+.5f}" for share in shares)
            of_losses.add_row(f"{row['time']:g}", f"{row['dense']:.5f}", *values)
    return [of_loops, of_losses]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="FILE", help="weights")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--topk", nargs="+", type=float, default=[0.125, 0.25, 0.5])
    parser.add_argument("--clips", type=int, default=16, help="held-out clips, and samples drawn")
    parser.add_argument("--steps", type=int, default=24, help="of a denoising loop")
    parser.add_argument("--real", type=float, help="share of real clips; by default as in training")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out} must be in a folder that exists")
    if not all(LEAST < share <= 0.5 for share in options.topk):
        parser.error(f"--topk must be shares above {LEAST} and at most 0.5, not {options.topk}")
    command = ["bench/schedules.py", *sys.argv[1:]]
    head = provenance(device, command=command, commit=options.commit)
    head |= {"steps": options.steps, "sources": []}
    console, rows = Console(width=110), []
    for path in options.sources:
        try:
            source = open_source(path, device, options.clips, 1, options.real)
        except (ValueError, ModuleNotFoundError) as error:
            parser.error(str(error))
        model = None if source.trained is None else source.trained.sparse()
        if model is None:
            parser.error(f"{path} must be weights of a kind whose layers choose tiles")
        given = source.trained, model, options.topk
        own = []
        for row in chain(loops(*given, options.steps), losses(*given)):
            own.append({"source": source.name, **row})
            write(options.out, head, rows + own, complete=False)
        for table in tables(source.name, own, options.topk):
            console.print(table)
        rows += own
        head["sources"].append({"name": source.name, **source.about})
        write(options.out, head, rows, complete=path == options.sources[-1])


if __name__ == "__main__":
    main()
