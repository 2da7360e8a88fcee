# SPDX-License-Identifier: Apache-2.0
"""``vsa check --shape``: layers of models against fp64, on sampled tiles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vsa.cli import options
from vsa.measure.machine import machine
from vsa.measure.provenance import provenance, write
from vsa.measure.shapes import GRIDS, ONE_KEY_HEAD, PADDED_TEXT, SHAPES
from vsa.verify import layer as layers
from vsa.verify.layer import Layer

HEADS = 2
"""Of every layer: heads do not know each other, so a model's many would only take longer."""
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
"""Of grids whose model is not in the table of shapes."""


def check_layers(
    names: Sequence[str],
    head_dims: Sequence[int],
    device: torch.device,
    backend: str,
    tiles: int,
    small: bool,
    gradients: bool,
    file: Path | None,
) -> bool:
    """Check every case, print a line each and a table; whether all pass.

    Args:
        names: of shapes.
        head_dims: to check instead of the shapes' own; empty for these.
        device: where.
        backend: which, or "auto".
        tiles: sampled query tiles of a grid.
        small: whether to take about a quarter of each grid along each axis.
        gradients: whether the backward is checked too.
        file: the JSON to write; None for none.

    Raises:
        typer.BadParameter: a backend that cannot run one of the cases.
    """
    console = Console()
    columns = [name for name in layers.LIMITS if gradients or not name.startswith("d")]
    table = Table("shape", "tokens", "text", "passed", *columns)
    head: dict[str, Any] = provenance(device) | {"small": small}
    rows: list[dict[str, Any]] = []
    write(file, head, rows, complete=False)
    cases = {name: _cases(name, head_dims, small) for name in names}
    for layer in (layer for each in cases.values() for layer in each):  # before any work
        options.check_backend(backend, device, layer.dtype, layer.head_dim, gradients)
    for name, each in cases.items():
        mine = []
        for layer in each:
            by = options.check_backend(backend, device, layer.dtype, layer.head_dim, gradients)
            mine.append(row_of(name, layer, device, by, tiles, gradients))
            console.print(line_of(mine[-1]), highlight=False, soft_wrap=True)
            write(file, head, rows + mine, complete=False)
        grid = each[0].grid
        rows += mine
        worst = torch.tensor([[row["multiples"][x] for x in columns] for row in mine]).amax(0)
        passed = f"{sum(not row['failed'] for row in mine)}/{len(mine)}"
        where = "x".join(map(str, grid.shape)), f"{grid.prefix}+{grid.suffix}"
        table.add_row(name, *where, passed, *(f"{x:.2f}" for x in worst))
    write(file, head, rows)
    console.print(table)
    console.print("Worst error of a tile as a multiple of its yardstick's; 2 passes, of lse 1.")
    console.print(machine(device))
    return not any(row["failed"] for row in rows)


def _cases(name: str, head_dims: Sequence[int], small: bool) -> list[Layer]:
    """What is checked of a shape."""
    grid = layers.small(GRIDS[name]) if small else GRIDS[name]
    own = (SHAPES[name].head_dim,) if name in SHAPES else HEAD_DIMS
    kv_heads = 1 if name in ONE_KEY_HEAD else HEADS
    padded = name in PADDED_TEXT
    return [
        Layer(grid, HEADS, kv_heads, head_dim, dtype, padded_text=padded)
        for head_dim, dtype in product(head_dims or own, DTYPES)
    ]


def row_of(
    name: str, layer: Layer, device: torch.device, backend: str, tiles: int, gradients: bool
) -> dict[str, Any]:
    """One case, from random tensors to a verdict."""
    start = time.perf_counter()
    verdict = layers.check(layer, device, backend, tiles, gradients)
    return {
        "shape": name,
        "grid": list(layer.grid.shape),
        "prefix": layer.grid.prefix,
        "suffix": layer.grid.suffix,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "topk": layer.topk,
        "backend": backend,
        "multiples": verdict.multiples,
        "failed": verdict.failed,
        "ms": (time.perf_counter() - start) * 1e3,
    }


def line_of(row: dict[str, Any]) -> str:
    """A case for people."""
    numbers = ", ".join(f"{x} {multiple:.2f}" for x, multiple in row["multiples"].items())
    verdict = f"FAILED: {', '.join(row['failed'])}" if row["failed"] else "ok"
    where = f"{row['shape']:21s} d{row['head_dim']:<3d} {row['dtype']}"
    return f"{where}: {numbers}, {row['ms'] / 1e3:.1f} s: {verdict}"
