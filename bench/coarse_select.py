# SPDX-License-Identifier: Apache-2.0
"""Time and memory of means, scores, select, coarse and combine, and of the whole operation.

usage: python bench/coarse_select.py [--out results.json] [--commit HASH] [--smoke]

``--smoke`` runs a tiny case on the emulator, to see that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa
from vsa.backends import BACKENDS, torch_coarse
from vsa.backends.kernels import coarse_backward
from vsa.backends.kernels import coarse_select as kernels
from vsa.backends.torch_combine import combine
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import peak_memory, seconds
from vsa.stages.coarse import coarse_attention
from vsa.values import bitmap, budget
from vsa.values.problem import Gates, Means, Problem, TileScores

SHAPES = {"480p": ((21, 30, 52), 12, 128), "720p": ((21, 45, 80), 40, 128)}
TINY = {"smoke": ((4, 8, 13), 2, 64)}
SHARE = 0.125
LONG = 0.01
"""Seconds from which on a call is repeated less often."""
TOP_P = vsa.TopP(0.9, floor=0.05)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        shape: which video.
        stage: which stage.
        what: how it is computed.
        ms: median time.
        moved: bytes that the stage has to read and write, at least; 0 where that says nothing.
        results: bytes of what it returns.
        peak: the most bytes that it held at once beyond its inputs, results included.
    """

    shape: str
    stage: str
    what: str
    ms: float
    moved: int
    results: int
    peak: int


class Call(NamedTuple):
    """What becomes a row; the fields are those of ``Row``."""

    stage: str
    what: str
    function: Callable[[], Any]
    moved: int = 0


@dataclass(frozen=True)
class Layer:
    """One layer's random inputs in bf16, flat, and how its calls are measured."""

    name: str
    grid: vsa.Grid
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    backend: str
    repeats: int

    @property
    def kernels(self) -> Any:
        """Our own kernels as they run on this device."""
        return BACKENDS[self.backend]

    @classmethod
    def random(
        cls, name: str, grid: vsa.Grid, heads: int, head_dim: int, device: torch.device
    ) -> Layer:
        """A layer on a device."""
        size = 4, 1, grid.tokens, heads, head_dim
        tensors = torch.randn(size, device=device, dtype=torch.bfloat16).unbind()
        on_gpu = device.type == "cuda"
        return cls(name, grid, *tensors, "hopper" if on_gpu else "emulated", 11 if on_gpu else 1)

    def row(self, stage: str, what: str, function: Callable[[], Any], moved: int = 0) -> Row:
        """Measure a call."""
        return self.rows_in_turns([Call(stage, what, function, moved)])[0]

    def rows_in_turns(self, calls: Sequence[Call]) -> list[Row]:
        """Measure calls in turns, so that all of them meet the GPU at the same clocks."""
        functions = [call.function for call in calls]
        once = max(seconds(function, self.q.device, 1, calls=1)[0] for function in functions)
        repeats, in_a_row = (self.repeats, 10) if once < LONG else (3, 3)
        turns = [
            [seconds(function, self.q.device, 1, calls=in_a_row)[0] for function in functions]
            for _ in range(repeats)
        ]
        rows = []
        for call, *times in zip(calls, *turns, strict=True):
            result, peak = peak_memory(call.function, self.q.device)
            ms = statistics.median(times) * 1e3
            rows.append(Row(self.name, call.stage, call.what, ms, call.moved, nbytes(result), peak))
        return rows


def nbytes(result: Any) -> int:
    """Bytes of the tensors that a call returned."""
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(map(nbytes, result)) if isinstance(result, (list, tuple)) else 0


@torch.no_grad()
def means_and_selection(layer: Layer, means: list[Tensor]) -> Iterator[Row]:
    """From tokens to bitmaps, by our kernels and by PyTorch."""
    xs, grids, n = [layer.q, layer.k, layer.v], [layer.grid] * 3, layer.grid.num_tiles
    heads, head_dim = layer.q.shape[2:]
    read = 3 * layer.q.nbytes + nbytes(means)
    by_pytorch = partial(map, torch_coarse.tile_means, xs, grids)
    yield layer.row("means", "PyTorch", lambda: list(by_pytorch()), read)
    yield layer.row("means", "one kernel", lambda: layer.kernels.tile_means(xs, grids), read)

    scale, score_bytes = head_dim**-0.5, heads * n * n * 4
    for size in (16, 32, 64):
        for name, multiply in (
            ("one fp32 product", torch_coarse.product),
            ("six bf16 products", partial(kernels.multiply, layer.kernels.machine)),
        ):
            slices = partial(torch_coarse.score_slices, *means[:2], scale, size << 20, multiply)
            what = f"{name}, slices of {size} MiB"
            yield layer.row("scores", what, lambda s=slices: [None for _ in s()], score_bytes)

    words = torch.empty(heads * n, bitmap.num_words(n), dtype=torch.int32, device=layer.q.device)
    count = list(budget.resolve(SHARE, n, heads).counts)
    itself = bitmap.pack(torch.eye(n, dtype=torch.bool, device=layer.q.device))
    least = list(budget.resolve(TOP_P, n, heads).counts)
    select_rows = partial(kernels.select_rows, layer.kernels.machine)
    for kind, scores in score_kinds(heads, n, means):
        for what, must, counts, mass in (
            (f"top {SHARE:.1%}", None, count, 0.0),
            (f"top {SHARE:.1%}, itself forced", itself, count, 0.0),
            (f"top {SHARE:.1%}, a budget per head", None, count * heads, 0.0),
            (f"TopP({TOP_P.mass})", None, least, TOP_P.mass),
        ):
            select = partial(select_rows, scores, must, counts, mass, n, 0, words)
            yield layer.row("select", f"kernel, {what}, {kind} scores", select, score_bytes)
        weights = torch.empty_like(scores)
        select = partial(select_rows, scores, None, count, 0.0, n, 0, words, weights)
        what = f"kernel, top {SHARE:.1%} and softmax, {kind} scores"
        yield layer.row("select", what, select, 2 * score_bytes)
        del scores, weights
    for what, backend in (("PyTorch", "torch"), ("product and kernel", layer.backend)):
        asked = TileScores(*means[:2], None, count, 0.0, None, scale, backend)
        choose = partial(BACKENDS[backend].select, asked)
        yield layer.row("scores + select", what, choose, score_bytes)
        attend = partial(choose, means[2])
        yield layer.row("scores + select + coarse", what, attend, score_bytes)


def score_kinds(heads: int, n: int, means: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Scores whose spread makes the search for a cut short or long, (heads * n, n) each."""
    shape, device = (heads * n, n), means[0].device
    yield "heavy-tailed", torch.randn(shape, device=device) / torch.randn(shape, device=device)
    yield "half equal", torch.randn(shape, device=device).clamp_(max=0.2)
    slices = torch_coarse.score_slices(*means[:2], 1.0, 1 << 28)
    yield "random", torch.cat([part.scores.flatten(0, 1) for part in slices])


def coarse_and_combine(layer: Layer, means: list[Tensor]) -> Iterator[Row]:
    """The coarse branch and the gates, and their gradients, as passes of their own."""
    size, scale = layer.q.nbytes, layer.q.shape[-1] ** -0.5
    coarse = coarse_attention(*means, scale, layer.backend)
    by_pytorch = partial(combine, layer.q, coarse, None, layer.gate, layer.grid)
    with torch.no_grad():
        yield layer.row(
            "coarse", "SDPA fp32", lambda: coarse_attention(*means, scale, layer.backend)
        )
        yield layer.row("combine", "PyTorch", by_pytorch, 3 * size)

    leaves = [x.detach().requires_grad_() for x in means]
    out = coarse_attention(*leaves, scale, layer.backend)
    upstream, grads = torch.randn_like(out), [torch.empty_like(x) for x in means]
    yield layer.row(
        "coarse, backward",
        "SDPA fp32",
        lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
    )
    written_out = partial(
        coarse_backward.coarse_attention_backward,
        layer.kernels.machine,
        upstream,
        coarse,
        means,
        scale,
        grads,
    )
    yield layer.row("coarse, backward", "written out", written_out)
    with torch.no_grad():
        yield layer.row(
            "means, backward",
            "PyTorch, q, k and v: spread, and added to what there is",
            lambda: [
                torch.add(x, spread, out=x)
                for x, spread in zip(
                    (layer.q, layer.k, layer.v),
                    torch_coarse.spread_means(grads, layer.grid, layer.q.dtype),
                    strict=True,
                )
            ],
            12 * size,
        )


def fine_and_whole(layer: Layer, means: list[Tensor]) -> Iterator[Row]:
    """The fine kernels without and with what is fused into them, then vsa.attention."""
    size, n = layer.q.nbytes, layer.grid.num_tiles
    selection = vsa.select(layer.q, layer.k, SHARE, grid=layer.grid)
    qkv, ints, scale = (layer.q, layer.k, layer.v), layer.grid.as_ints(), layer.q.shape[-1] ** -0.5
    asked = Problem(*qkv, selection.bitmap, None, ints, ints, scale, layer.backend)
    coarse = torch.ops.vsa.coarse_attention(*means, scale, layer.backend)
    coarse_gate = *asked, *Gates(None, layer.gate, coarse)
    both_gates = *asked, *Gates(layer.gate, layer.gate, coarse)
    saving = *asked, *Means(*means), *Gates(None, layer.gate, coarse)
    fused = torch.ops.vsa.gated_attention_inference
    apart = partial(torch.ops.vsa.gated_attention, *saving)
    attend = partial(vsa.attention, *qkv, SHARE, grid=layer.grid, backend=layer.backend)
    fine = partial(torch.ops.vsa.block_sparse_attention, *asked, n)
    calls = [Call("fine", "kernel", fine, 4 * size)]
    for what, arguments, gates in (("coarse gate", coarse_gate, 1), ("both", both_gates, 2)):
        name = f"kernel with its epilogue, {what}"
        calls.append(Call("fine + combine", name, partial(fused, *arguments), (4 + gates) * size))
    calls.append(Call("fine + combine", "kernels apart, coarse gate", apart, 7 * size))
    for what, own in gate_kinds(layer.gate):
        calls.append(Call("attention, inference", what, partial(attend, **own)))
    with torch.no_grad():
        yield from layer.rows_in_turns(calls)

    leaves = [x.detach().requires_grad_() for x in (*qkv, layer.gate, layer.gate)]
    attend = partial(vsa.attention, *leaves[:3], SHARE, grid=layer.grid, backend=layer.backend)
    for (what, _), wanted in zip(gate_kinds(layer.gate), (3, 4, 5), strict=True):
        own = dict(zip(("gate_coarse", "gate_fine"), leaves[3:wanted], strict=False))
        forward = partial(attend, **own)
        yield layer.row("attention, training", what, forward)
        out = forward()
        backward = partial(torch.autograd.grad, out, leaves[:wanted], layer.gate, retain_graph=True)
        yield layer.row("attention, backward", what, backward)
        del out


def gate_kinds(gate: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    """Which gates a call of vsa.attention has."""
    coarse = {"gate_coarse": gate}
    return [("no gate", {}), ("coarse gate", coarse), ("both gates", coarse | {"gate_fine": gate})]


def summary(rows: list[Row], layer: Layer) -> str:
    """What the whole costs beside the fine kernel, in time and in memory."""
    fine = next(row.ms for row in rows if row.stage == "fine")
    lines = []
    for row in rows:
        if row.stage.startswith("attention"):
            inputs = next(3 + len(own) for what, own in gate_kinds(layer.gate) if what == row.what)
            beyond = row.peak - row.results
            share = beyond / (inputs * layer.q.nbytes)
            line = f"{row.stage}, {row.what}: peak beyond inputs and results "
            line += f"{beyond / 2**20:,.0f} MiB, {share:.1%} of the inputs"
            if "inference" in row.stage:
                line += f"; all but the fine kernel takes {row.ms / fine - 1:.1%} of it"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and a summary for each video, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write every row as JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny case on the emulator")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: --smoke runs a tiny case on the emulator")
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", 0)
    command = ["bench/coarse_select.py", *sys.argv[1:]]
    head = provenance(device, command=command, commit=arguments.commit)
    every: list[dict[str, Any]] = []
    shapes = TINY if arguments.smoke else SHAPES
    for name, (extent, heads, head_dim) in shapes.items():
        layer = Layer.random(name, vsa.Grid(extent), heads, head_dim, device)
        means = layer.kernels.tile_means([layer.q, layer.k, layer.v], [layer.grid] * 3)
        print("| video | stage | computed by | ms | GB | GB/s | results, MiB | peak, MiB |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
        rows = []
        for measured in (means_and_selection, fine_and_whole, coarse_and_combine):
            for row in measured(layer, means):
                rows.append(row)
                print(line_of(row), flush=True)
        print(f"\n{summary(rows, layer)}\n", flush=True)
        every += [asdict(row) for row in rows]
        write(
            arguments.out, head, every, complete=len({row["shape"] for row in every}) == len(shapes)
        )
        del layer, means


def line_of(row: Row) -> str:
    """Of a Markdown table."""
    speed = f"{row.moved / row.ms / 1e6:,.0f}" if row.moved else ""
    moved = f"{row.moved / 1e9:.2f}" if row.moved else ""
    held = f"{row.results / 2**20:,.1f} | {row.peak / 2**20:,.1f}"
    return f"| {row.shape} | {row.stage} | {row.what} | {row.ms:.3f} | {moved} | {speed} | {held} |"


if __name__ == "__main__":
    main()
