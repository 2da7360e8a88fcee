# SPDX-License-Identifier: Apache-2.0
"""Time of everything around the fine kernel, stage by stage, on a Hopper GPU.

usage: python bench/routing.py [--out results.json] [--smoke]

``--smoke`` runs a tiny case on a CPU, to see that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import vsa
from vsa import bitmap, budget, coarse
from vsa.backends import BACKENDS, Request, pytorch_routing, routing
from vsa.combine import combine
from vsa.measure import peak_memory, seconds

SHAPES = {"480p": ((21, 30, 52), 12, 128), "720p": ((21, 45, 80), 40, 128)}
SHARE = 0.125
TOP_P = vsa.TopP(0.9, floor=0.05)
REPEATS = 11


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        shape: which video.
        stage: which stage.
        what: how it is computed.
        ms: median time.
        moved: GB that the stage has to read and write, at least.
    """

    shape: str
    stage: str
    what: str
    ms: float
    moved: float


def stages(
    name: str, grid: vsa.Grid, heads: int, head_dim: int, device: torch.device
) -> Iterator[Row]:
    """All stages of one shape."""

    def row(stage: str, what: str, function: Callable[[], object], moved: float = 0.0) -> Row:
        with torch.no_grad():
            times = seconds(function, device, REPEATS)
        return Row(name, stage, what, statistics.median(times) * 1e3, moved / 1e9)

    q, k, v, gate = torch.randn(
        4, 1, grid.tokens, heads, head_dim, device=device, dtype=torch.bfloat16
    )
    n, xs, grids = grid.num_tiles, [q, k, v], [grid] * 3
    means = routing.tile_means(xs, grids)
    yield row(
        "means", "PyTorch", lambda: [pytorch_routing.tile_means(x, grid) for x in xs], 3 * q.nbytes
    )
    yield row("means", "one kernel", lambda: routing.tile_means(xs, grids), 3 * q.nbytes)
    yield row(
        "means, backward",
        "PyTorch, one of q, k, v",
        lambda: pytorch_routing.spread_means(means[0], grid, q.dtype),
        q.nbytes,
    )

    scale, score_bytes = head_dim**-0.5, heads * n * n * 4
    for size in (16, 32, 64):
        yield row(
            "scores",
            f"cuBLAS fp32, slices of {size} MiB",
            lambda size=size: [
                None for _ in pytorch_routing.score_slices(*means[:2], scale, size << 20)
            ],
            score_bytes,
        )

    words = torch.empty(heads * n, bitmap.num_words(n), dtype=torch.int32, device=device)
    count = [budget.resolve(SHARE, n, heads).counts[0]]
    for kind, scores in score_kinds(heads, n, means, device):
        for what, counts, mass in (
            (f"top {SHARE:.1%}", count, 0.0),
            (f"top {SHARE:.1%}, a budget per head", count * heads, 0.0),
            (f"TopP({TOP_P.mass})", list(budget.resolve(TOP_P, n, heads).counts), TOP_P.mass),
        ):
            yield row(
                "select",
                f"kernel, {what}, {kind} scores",
                lambda s=scores, c=counts, m=mass: routing.select_rows(s, None, c, m, n, 0, words),
                score_bytes,
            )
    must = bitmap.pack(torch.eye(n, dtype=torch.bool, device=device))
    yield row(
        "select",
        f"kernel, top {SHARE:.1%}, itself forced",
        lambda s=scores: routing.select_rows(s, must, count, 0.0, n, 0, words),
        score_bytes,
    )
    del scores
    yield row(
        "scores + select",
        "PyTorch",
        lambda: pytorch_routing.select(*means[:2], None, count, scale, 0.0),
        score_bytes,
    )
    for size in (16, 32, 64):
        routing.SCORE_BYTES = size << 20
        yield row(
            "scores + select",
            f"cuBLAS and kernel, slices of {size} MiB",
            lambda: routing.select(*means[:2], None, count, scale, 0.0),
            score_bytes,
        )
    yield row("coarse", "SDPA fp32", lambda: coarse.coarse_attention(*means, scale))
    yield row(
        "combine",
        "PyTorch",
        lambda: combine(q, means[0], None, gate, grid),
        3 * q.nbytes,
    )
    if BACKENDS["hopper"].why_not(Request(device.type, device.index)) is None:
        selection = vsa.select(q, k, SHARE, grid=grid)
        yield row("fine", "hopper", lambda: vsa.block_sparse_attention(q, k, v, selection))
        yield row("attention", "no gate", lambda: vsa.attention(q, k, v, SHARE, grid=grid))
        gated = {"grid": grid, "gate_coarse": gate}
        yield row("attention", "gate_coarse", lambda: vsa.attention(q, k, v, SHARE, **gated))
        with torch.no_grad():
            _, peak = peak_memory(lambda: vsa.attention(q, k, v, SHARE, **gated), device)
        print(
            f"{name}: peak memory of vsa.attention with a coarse gate beyond inputs and output: "
            f"{(peak - q.nbytes) / 2**20:.0f} MiB, {(peak - q.nbytes) / (4 * q.nbytes):.0%} of "
            "q, k, v and the gate"
        )


def score_kinds(
    heads: int, n: int, means: list[Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Scores whose spread makes the search for a cut short or long, (heads * n, n) each."""
    shape = heads * n, n
    yield "heavy-tailed", torch.randn(shape, device=device) / torch.randn(shape, device=device)
    yield "half equal", torch.randn(shape, device=device).clamp_(max=0.2)
    yield (
        "random",
        torch.cat([scores for _, scores in pytorch_routing.score_slices(*means[:2], 1.0, 1 << 28)]),
    )


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", 0)
    shapes = {"smoke": ((4, 8, 13), 2, 16)} if arguments.smoke else SHAPES
    rows = []
    print(
        "| video | stage | computed by | ms | GB | GB/s |\n| --- | --- | --- | ---: | ---: | ---: |"
    )
    for name, (extent, heads, head_dim) in shapes.items():
        for row in stages(name, vsa.Grid(extent), heads, head_dim, device):
            rows.append(row)
            speed = f"{row.moved / row.ms * 1e3:,.0f}" if row.moved else ""
            moved = f"{row.moved:.2f}" if row.moved else ""
            print(
                f"| {row.shape} | {row.stage} | {row.what} | {row.ms:.3f} | {moved} | {speed} |",
                flush=True,
            )
    if arguments.out:
        machine = "CPU" if arguments.smoke else torch.cuda.get_device_name(device)
        facts = {"device": machine, "torch": torch.__version__}
        arguments.out.write_text(json.dumps(facts | {"rows": [asdict(r) for r in rows]}, indent=1))


if __name__ == "__main__":
    main()
