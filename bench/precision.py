# SPDX-License-Identifier: Apache-2.0
"""What int8 and fp8 change in trained models: in every head, and at the end of a denoising loop.

usage: python bench/precision.py pair/weights-vsa.pt pair/weights-full.pt --out precision.json

Takes weights that ``vsa train`` has left, or recordings of queries, keys and values
(bench/recall_sources.py says what is in them). Runs held-out clips, and measures in every layer and
head the error of each precision on the tiles that the layer chooses, the worst query tile, and the
log-sum-exp (bench/precision_measures.py says how). What leaving tiles out changes stands beside.

Of weights it also measures the whole model: held-out loss, and a denoising loop from the same noise
in every precision. "dense" keeps every tile, "native in fp32" has no 16 bits, and "chosen" takes
layer by layer what ``vsa.diagnostics.PrecisionErrors.choose`` says. A model that was trained dense
is made sparse without training.

A Hopper GPU runs the kernels. --backend torch simulates their roundings on any device.
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
from rich.table import Table

from precision_measures import (
    CHOSEN,
    DENSE,
    SPARSITY,
    Errors,
    Loop,
    difference,
    of_layers,
    of_model,
)
from recall_sources import Source, open_source
from vsa.measure.machine import machine
from vsa.measure.provenance import provenance, write
from vsa.values import checks
from vsa.values.precision import HEAD_DIMS, PRECISIONS

Row = dict[str, Any]


def rows_of_layers(source: Source, found: Mapping[str, Mapping[str, Errors]]) -> list[Row]:
    """A row for each layer and precision."""
    return [
        {
            "source": source.name,
            "what": "layer",
            "layer": layer,
            "precision": precision,
            "error": errors.error.mean().item(),
            "error_most": errors.error.max().item(),
            "worst_tile": errors.worst.max().item(),
            "lse_most": errors.lse.max().item(),
            "error_by_head": errors.error.tolist(),
            "worst_tile_by_head": errors.worst.tolist(),
            "lse_by_head": errors.lse.tolist(),
        }
        for layer, of_layer in found.items()
        for precision, errors in of_layer.items()
    ]


def rows_of_model(source: Source, loops: Mapping[str, Loop]) -> list[Row]:
    """A row for each way of running the model."""
    rows = []
    for name, loop in loops.items():
        to_native = difference(loop.videos, loops["native"].videos)
        to_dense = difference(loop.videos, loops[DENSE].videos)
        rows.append(
            {
                "source": source.name,
                "what": "model",
                "precision": name,
                "by_layer": list(loop.precision),
                "loss": loop.loss.mean().item(),
                "loss_clips": loop.loss.tolist(),
                "to_native": to_native[-1].item(),
                "to_dense": to_dense[-1].item(),
                "to_native_by_step": to_native.tolist(),
                "to_dense_by_step": to_dense.tolist(),
            }
        )
    return rows


def layer_table(source: Source, rows: list[Row]) -> Table:
    """Errors of layers: the mean of the heads, the largest, and the worst tile."""
    about = f"{source.name}: errors of heads, {source.about.get('clips', '?')} held-out clips"
    found = Table(title=about, title_justify="left")
    found.add_column("layer", no_wrap=True)
    kinds = (*PRECISIONS, SPARSITY)
    for name in kinds:
        found.add_column(name, justify="right")
    layers = dict.fromkeys(row["layer"] for row in rows)
    for layer in layers:
        own = {row["precision"]: row for row in rows if row["layer"] == layer}
        found.add_row(
            layer,
            *(
                f"{own[name]['error']:.4f}, {own[name]['error_most']:.4f}, "
                f"{own[name]['worst_tile']:.3f}"
                for name in kinds
            ),
        )
    found.caption = (
        "Relative error of the output against fp64 over the same tiles: the mean of the heads, the "
        "largest, and that of the worst query tile. Sparsity: what the tiles left out change, in "
        "fp64."
    )
    return found


def model_table(source: Source, rows: list[Row], steps: int) -> Table:
    """Loss and final samples of the whole model."""
    found = Table(title=f"{source.name}: the whole model, {steps} steps", title_justify="left")
    found.add_column("precision", no_wrap=True)
    for column in ("held-out loss", "sample to native", "to dense", "layers that are not native"):
        found.add_column(column, justify="right")
    for row in rows:
        low = sum(each != "native" for each in row["by_layer"])
        found.add_row(
            row["precision"],
            f"{row['loss']:.5f}",
            f"{row['to_native']:.2%}",
            f"{row['to_dense']:.2%}",
            f"{low} of {len(row['by_layer'])}",
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
    found.add_argument("--topk", type=float, default=0.125, help="share of the tiles")
    found.add_argument("--clips", type=int, default=16, help="held-out clips, and samples drawn")
    found.add_argument("--steps", type=int, default=50, help="of a denoising loop")
    found.add_argument(
        "--at-most",
        type=float,
        default=0.05,
        help="error of a layer's worst head up to which it is not native where they are chosen",
    )
    found.add_argument("--real", type=float, help="share of real clips; by default as in training")
    found.add_argument("--backend", default="auto", choices=("auto", "hopper", "emulated", "torch"))
    found.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return found


def checked(options: argparse.Namespace, refuse: Any) -> None:
    """What can be refused before work."""
    for path in filter(None, (options.out, options.plot)):
        if not path.absolute().parent.is_dir():
            refuse(f"{path} must be in a folder that exists")
    if options.plot and find_spec("matplotlib") is None:
        refuse("--plot needs matplotlib, which the extra demo brings")
    try:
        checks.share("--topk", options.topk)
        checks.share("--at-most", options.at_most)
        for name in ("clips", "steps"):
            checks.integer(f"--{name}", getattr(options, name), at_least=1)
    except (ValueError, TypeError) as error:
        refuse(str(error))


def look_at(source: Source, options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure one source, and print it."""
    with console.status(f"{source.name}: layers"):
        found = of_layers(source, options.topk, options.backend)
    layers = rows_of_layers(source, found)
    console.print(layer_table(source, layers))
    if source.trained is None:
        return layers
    with console.status(f"{source.name}: the whole model"):
        loops = of_model(
            source.trained, options.topk, options.steps, options.at_most, options.backend
        )
    if not loops:
        console.print(f"{source.name}: its layers choose no tiles, so no model is run")
        return layers
    models = rows_of_model(source, loops)
    console.print(model_table(source, models, options.steps))
    taken = ", ".join(loops[CHOSEN].precision)
    console.print(f"chosen, with at most {options.at_most:g} in a layer's worst head: {taken}")
    return layers + models


def main() -> None:
    """Measure, print, write, draw."""
    asked = parser()
    options = asked.parse_args()
    checked(options, asked.error)
    gpu = torch.cuda.is_available() and not options.cpu
    device, console = torch.device("cuda", 0) if gpu else torch.device("cpu"), Console(width=120)
    head = provenance(device, command=["bench/precision.py", *sys.argv[1:]])
    head |= {name: getattr(options, name) for name in ("topk", "steps", "at_most", "backend")}
    head |= {"sources": []}
    rows: list[Row] = []
    for path in options.sources:
        try:
            source = open_source(path, device, options.clips, 1, options.real)
            clip = next(iter(source.held_out))
            head_dim = next(iter(clip.values())).q.shape[-1]
            if head_dim not in HEAD_DIMS:
                raise ValueError(
                    f"{path} has a head_dim of {head_dim}, but low precision takes "
                    f"{' or '.join(map(str, HEAD_DIMS))}"
                )
        except (ValueError, ModuleNotFoundError) as error:
            asked.error(str(error))
        rows += look_at(source, options, console)
        about = {"name": source.name, "grid": list(source.grid.shape), **source.about}
        head["sources"].append(about)
        write(options.out, head, rows, complete=path == options.sources[-1])
    if options.plot:
        from precision_picture import draw

        draw(head, rows, options.plot)
    console.print(f"{machine(device)}; written to {options.out}")


if __name__ == "__main__":
    main()
