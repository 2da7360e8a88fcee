# SPDX-License-Identifier: Apache-2.0
"""What ``score=vsa.SubBlocks(n)`` costs beside the paper's score, after scores are held to fp64.

usage: python bench/sub_blocks.py [--out results.json] [--commit HASH] [--smoke] [SHAPE ...]

Shapes are those of vsa/measure/shapes.py. Parts are timed eagerly, several calls in a row, and in a
CUDA graph, mean and sub-blocks in turns. Inputs are random, one set, as scores and choices do not
read the tokens. ``--smoke`` runs a tiny case on the emulator; its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from vsa.backends import BACKENDS, torch_sub_blocks
from vsa.backends.kernels import coarse_calls, sub_blocks
from vsa.backends.kernels.calls import means_call
from vsa.backends.kernels.coarse_calls import select_call
from vsa.backends.kernels.tensors import as_matrices
from vsa.measure import shapes
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds
from vsa.measure.ways import QUEUED, host_seconds, in_a_graph
from vsa.values import bitmap, budget
from vsa.values.problem import SubBlockScores
from vsa.verify import dense

SHAPES = ("wan-1.3b-480p", "ltx-video", "wan-14b-720p")
TINY = shapes.Shape(vsa.Grid((4, 8, 13)), 2, 64)
SHARE = 0.125
TURNS = 7
Part = Callable[[], object]


class Layer:
    """One layer's random q, k, v and gate, and the calls of both scores by parts."""

    def __init__(self, shape: shapes.Shape, runs: int, device: torch.device) -> None:
        self.grid, self.runs, self.device = shape.grid, runs, device
        size = 4, 1, shape.grid.length, shape.heads, shape.head_dim
        self.q, self.k, self.v, self.gate = torch.randn(
            size, device=device, dtype=torch.bfloat16
        ).unbind()
        self.backend = BACKENDS["hopper" if device.type == "cuda" else "emulated"]
        self.scale, self.heads, self.tiles = shape.head_dim**-0.5, shape.heads, self.grid.num_tiles
        self.counts = list(budget.resolve(SHARE, self.tiles, self.heads).counts)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def _run(self, calls: Sequence[Any]) -> None:
        for call in calls:
            self.backend.machine.run(call, self.device)  # type: ignore[attr-defined]

    def parts(self) -> dict[str, tuple[Part, Part]]:
        """By name: of the mean's score, and of sub-blocks."""
        grids = self.grid, self.grid
        heads, tiles = self.heads, self.tiles
        mean_shape = 1, heads, tiles, self.q.shape[-1]
        means = [self._empty(mean_shape, torch.float32) for _ in range(2)]
        queries = sub_blocks.rows_of_queries(self.q, heads, tiles, self.runs, self._empty)
        keys = sub_blocks.rows_of_keys(self.k, tiles, self.runs, self._empty)
        self.kept = means, queries, keys  # calls have their addresses
        numbers = heads * tiles, tiles
        self.scores = self._empty(numbers, torch.float32)
        self.words = self._empty((heads * tiles, bitmap.num_words(tiles)), torch.int32)
        whole = 1 << 40  # of scores that exist at a time: all
        choice = coarse_calls.Choice(
            *(as_matrices(x, heads) for x in means), None, self.scale, None, self.counts, 0.0, tiles
        )
        of_runs = sub_blocks.RunChoice(
            queries,
            keys,
            tiles,
            sub_blocks.has_empty(grids, self.runs),
            self.scale,
            None,
            self.counts,
            0.0,
            tiles,
        )
        to_means = [means_call((self.q, self.k), grids, means)]
        to_runs = [
            sub_blocks.run_means_call((self.q, self.k), grids, (queries, keys), (), self.runs)
        ]
        self._run(to_means + to_runs)
        by_mean = list(coarse_calls.choice_calls(choice, self.scores, self.words, None, whole))
        by_runs = list(sub_blocks.choice_calls(of_runs, self.scores, self.words, whole))
        select = [select_call(self.scores, None, self.counts, 0.0, tiles, 0, self.words, None)]
        found = {
            "means of q and k": (to_means, to_runs),
            "scores": (by_mean[:1], by_runs[:1]),
            "select": (select, select),
            "scores + select": (by_mean, by_runs),
            "means + scores + select": (to_means + by_mean, to_runs + by_runs),
        }
        return {
            name: (partial(self._run, mean), partial(self._run, runs))
            for name, (mean, runs) in found.items()
        }

    def calls(self) -> dict[str, tuple[Part, Part]]:
        """Whole calls of vsa.attention by either score."""
        attend = partial(
            vsa.attention, self.q, self.k, self.v, SHARE, grid=self.grid, backend=self.backend.name
        )
        score, gate = vsa.SubBlocks(self.runs), self.gate
        gated = partial(attend, gate_coarse=gate)
        return {
            "attention, no gate": (attend, partial(attend, score=score)),
            "attention, coarse gate": (gated, partial(gated, score=score)),
        }

    def check(self) -> dict[str, float]:
        """Errors of scores as a share of their bound, and rows whose choice it does not allow."""
        ints = self.grid.as_ints()
        asked = SubBlockScores(
            self.q, self.k, None, self.counts, 0.0, None, ints, ints, self.runs, self.scale,
            self.backend.name,
        )  # fmt: skip
        words, _, _ = self.backend.select_by_sub_blocks(asked)
        chosen = bitmap.unpack(words, self.tiles)[0]
        self.parts()["scores"][1]()
        scores = self.scores.view(self.heads, self.tiles, self.tiles)
        worst, wrong, other = 0.0, 0, 0
        for head in sorted({0, self.heads // 2, self.heads - 1}):
            one = slice(head, head + 1)
            of_q, of_k = (
                torch_sub_blocks.run_means(x[:, :, one].double(), self.grid, self.runs)[0, 0]
                for x in (self.q, self.k)
            )
            sizes = torch_sub_blocks.run_sizes(self.grid.tile_sizes(self.device), self.runs)
            empty = sizes == 0
            truths, bounds = [], []
            for row in range(self.tiles):
                products = self.scale * torch.einsum("ad,jbd->jab", of_q[row], of_k)
                hidden = empty[row][None, :, None] | empty[:, None]
                truth = products.masked_fill(hidden, -torch.inf).logsumexp((1, 2))
                sums = torch.einsum("ad,jbd->jab", of_q[row].abs(), of_k.abs()).amax((1, 2))
                truths.append(truth)
                bounds.append(dense.rounding_bound(truth, sums, self.scale))
            truth, bound = torch.stack(truths), torch.stack(bounds)
            off = ((scores[head].double() - truth).abs() / bound).max().item()
            worst = max(worst, off) if off == off else float("nan")
            count = torch.tensor(self.counts[0], device=self.device)
            wrong += int((~dense.within(chosen[head], truth, bound, count, 0.0)).sum())
            best = torch.zeros_like(chosen[head])
            best.scatter_(1, truth.topk(self.counts[0]).indices, True)
            other += int((best != chosen[head]).any(-1).sum())
        return {
            "worst error of its bound": worst,
            "rows beyond it": wrong,
            "rows that differ": other,
        }


def timed(pair: tuple[Part, Part], device: torch.device, graph: bool) -> list[float]:
    """Median milliseconds of both, in turns."""
    functions = [in_a_graph(each, QUEUED) if graph else each for each in pair]
    in_a_row, calls = (2, QUEUED) if graph else (10, 1)
    for each in functions:
        seconds(each, device, 2, in_a_row)
    turns = [[seconds(each, device, 1, in_a_row)[0] for each in functions] for _ in range(TURNS)]
    return [statistics.median(times) * 1e3 / calls for times in zip(*turns, strict=True)]


@torch.no_grad()
def measure(name: str, shape: shapes.Shape, runs: int, device: torch.device) -> dict[str, Any]:
    """A row: checks, then the milliseconds of every part by both scores."""
    layer = Layer(shape, runs, device)
    checked = layer.check()
    row: dict[str, Any] = {"shape": name, "runs": runs} | checked
    said = ", ".join(f"{what} {number:.3g}" for what, number in checked.items())
    print(f"\n{name}, SubBlocks({runs}): {said}")
    if row["rows beyond it"] or not row["worst error of its bound"] <= 1:
        raise SystemExit(f"{name}: scores or choices are not what they should be")
    print("| part | way | mean, ms | sub-blocks, ms | ratio |\n| --- | --- | ---: | ---: | ---: |")
    ways = {"eager": False} | ({"graph": True} if device.type == "cuda" else {})
    for part, pair in (layer.parts() | layer.calls()).items():
        for way, graph in ways.items():
            mean, parts = timed(pair, device, graph)
            row[f"{part}, {way}, ms"] = [mean, parts]
            print(f"| {part} | {way} | {mean:.4f} | {parts:.4f} | {parts / mean:.2f} |", flush=True)
        if device.type == "cuda" and part.startswith("attention"):
            host = [host_seconds(each, 5) * 1e3 for each in pair]
            row[f"{part}, host, ms"] = host
            print(f"| {part} | host | {host[0]:.4f} | {host[1]:.4f} | {host[1] / host[0]:.2f} |")
    if device.type == "cuda":
        share = row["scores + select, graph, ms"][1] / row["attention, no gate, graph, ms"][0]
        print(f"scores + select by sub-blocks are {share:.1%} of the call by means, in a graph")
    return row


def main() -> None:
    """Check, measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--runs", type=int, nargs="*", default=[4, 8], help="of a tile")
    parser.add_argument("--out", type=Path, help="write every row as JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny case on the emulator")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: --smoke runs a tiny case on the emulator")
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", 0)
    command = ["bench/sub_blocks.py", *sys.argv[1:]]
    head = provenance(device, command=command, commit=arguments.commit)
    named = {name: shapes.by_name(name) for name in arguments.shapes or SHAPES}
    cases = {"smoke": TINY} if arguments.smoke else named
    rows: list[dict[str, Any]] = []
    for name, shape in cases.items():
        for runs in arguments.runs:
            rows.append(measure(name, shape, runs, device))
            write(arguments.out, head, rows, len(rows) == len(cases) * len(arguments.runs))


if __name__ == "__main__":
    main()
