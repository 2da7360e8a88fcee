# SPDX-License-Identifier: Apache-2.0
"""What a training mask over chunks costs: sparse attention with it and without, and FlexAttention.

usage: python bench/masks.py [--frames 21] [--out masks.json] [--commit HASH] [--kernels]
       python bench/masks.py --tiny

The layer is that of Wan 1.3B at 480p in chunks of 3 frames, tile (3, 5, 4), 12.5 % of what a row
may choose, with a coarse gate. Calls are timed by turns, so that all meet the same clock, forward
alone and with the backward. FlexAttention is PyTorch's, compiled, dense inside a block mask of the
same rule. Before it is timed, the masked call without gates is held to fp64 on its first chunk.
--kernels adds the time of each kernel of ours in both calls, by torch.profiler.
--tiny runs all of it in seconds on a CPU, whose times say nothing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

import vsa
from vsa.masks import ChunkCausal
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds, settled
from vsa.verify.parity import error

CHUNK, TOPK = 3, 0.125
ROUNDS = 9
"""Of timings of all calls; medians count."""
WORST = 0.02
"""Error of the first chunk, whose inputs are bf16."""


class Layer:
    """Inputs of a layer on a device."""

    def __init__(self, shape: tuple[int, int, int], heads: int, device: torch.device) -> None:
        self.grid = vsa.Grid(shape, tile=vsa.best_tile(shape, frames=CHUNK))
        self.device = device
        self.backend = "hopper" if device.type == "cuda" else "emulated"
        size = 5, 1, self.grid.length, heads, 128 if device.type == "cuda" else 64
        q, k, v, gate, upstream = torch.randn(size, device=device, dtype=torch.bfloat16).unbind()
        self.leaves = [x.requires_grad_() for x in (q, k, v, gate)]
        self.upstream = upstream

    def attend(self, mask: ChunkCausal | None) -> Tensor:
        """The call of a training step."""
        q, k, v, gate = self.leaves
        return vsa.attention(
            q, k, v, TOPK, grid=self.grid, gate_coarse=gate, mask=mask, backend=self.backend
        )

    def flex(self) -> Callable[[], Tensor]:
        """FlexAttention under the same rule, dense inside it."""
        plane = self.grid.shape[1] * self.grid.shape[2]

        def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key // plane // CHUNK <= query // plane // CHUNK

        tokens = self.grid.tokens
        blocks = create_block_mask(sees, None, None, tokens, tokens, device=self.device)
        attend = flex_attention
        if self.device.type == "cuda":
            attend = torch.compile(flex_attention, fullgraph=True)
        # On a CPU it refuses tensors that require gradients, wanted or not (PyTorch 2.13).
        leaves = self.leaves if self.device.type == "cuda" else [x.detach() for x in self.leaves]
        q, k, v = (x.transpose(1, 2) for x in leaves[:3])
        return lambda: attend(q, k, v, block_mask=blocks).transpose(1, 2)

    def check(self) -> float:
        """Error of the first chunk, which attends itself alone, at all of its tiles.

        Raises:
            SystemExit: with a sentence, if it is too large for times to mean anything.
        """
        q, k, v = (x.detach() for x in self.leaves[:3])
        own = CHUNK * self.grid.shape[1] * self.grid.shape[2]
        out = vsa.attention(
            q, k, v, 1.0, grid=self.grid, mask=ChunkCausal(CHUNK, window=1), backend=self.backend
        )
        heads = slice(0, 1)
        one = [x[:, :own, heads].double().transpose(1, 2) for x in (q, k, v)]
        truth = functional.scaled_dot_product_attention(*one).transpose(1, 2)
        off = error(out[:, :own, heads], truth)
        if not off <= WORST:
            raise SystemExit(f"masks.py: the masked call is off by {off:.1e}, more than {WORST}")
        return off

    def calls(self, backward: bool) -> dict[str, Callable[[], object]]:
        """By name; FlexAttention has no backward on a CPU."""
        mask = ChunkCausal(CHUNK)
        forwards: dict[str, Callable[[], Tensor]] = {
            "unmasked": lambda: self.attend(None),
            "masked": lambda: self.attend(mask),
        }
        if self.device.type == "cuda" or not backward:
            forwards["flex"] = self.flex()
        return {name: self._whole(call, backward) for name, call in forwards.items()}

    def _whole(self, call: Callable[[], Tensor], backward: bool) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(backward):
                out = call()
            if not backward:
                return out
            return torch.autograd.grad(out, self.leaves, self.upstream, allow_unused=True)

        return run


def measured(layer: Layer) -> Iterator[dict[str, Any]]:
    """A row for each direction."""
    device = layer.device
    for backward in (False, True):
        runs = layer.calls(backward)
        counts = {name: settled(run, device) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS if device.type == "cuda" else 1):
            for name, run in runs.items():
                times[name] += seconds(run, device, 1, counts[name])
        ms = {name: statistics.median(found) * 1e3 for name, found in times.items()}
        row: dict[str, Any] = {"direction": "forward+backward" if backward else "forward"}
        row |= {f"{name} ms": value for name, value in ms.items()}
        row["of unmasked"] = ms["masked"] / ms["unmasked"]
        if "flex" in ms:
            row["faster than flex"] = ms["flex"] / ms["masked"]
        yield row


def kernels(layer: Layer, backward: bool) -> dict[str, dict[str, float]]:
    """Microseconds per call of each kernel, by its name and then by call."""
    found: dict[str, dict[str, float]] = {}
    for name, run in layer.calls(backward).items():
        if name == "flex":
            continue
        run()
        activity = ProfilerActivity.CUDA if layer.device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            for _ in range(ROUNDS):
                run()
            if layer.device.type == "cuda":
                torch.cuda.synchronize(layer.device)
        for event in profiler.key_averages():
            of_device = event.self_device_time_total
            total = of_device if layer.device.type == "cuda" else event.self_cpu_time_total
            # Without namespaces and parameters.
            short = re.sub(r"\(anonymous namespace\)::|\w+::|^void |\(.*$", "", event.key)
            of_kernel = found.setdefault(short, {})
            of_kernel[name] = of_kernel.get(name, 0) + total / ROUNDS
    return found


def print_kernels(layer: Layer) -> None:
    """Tables of both directions, the longest kernels first."""
    for backward in (False, True):
        print(f"us per call, {'forward+backward' if backward else 'forward'}:")
        found = kernels(layer, backward)
        for name, us in sorted(found.items(), key=lambda row: -max(row[1].values()))[:40]:
            times = " ".join(f"{us.get(call, 0):9.1f}" for call in ("unmasked", "masked"))
            print(f"{times}  {name[:110]}")
        for call in ("unmasked", "masked"):
            print(f"{sum(us.get(call, 0) for us in found.values()):9.1f}  all of {call}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="masks.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the video")
    parser.add_argument("--tiny", action="store_true", help="a layer of 270 tokens, anywhere")
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, help="write rows to this .json file")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type != "cuda" and not given.tiny:
        parser.error("the kernels are timed on a Hopper GPU: pass --tiny to see that it runs")
    shape, heads = ((9, 5, 6), 2) if given.tiny else ((given.frames, 30, 52), 12)
    layer = Layer(shape, heads, device)
    about: dict[str, Any] = provenance(
        device, command=["bench/masks.py", *sys.argv[1:]], commit=given.commit
    )
    about |= {
        "backend": layer.backend, "topk": TOPK, "grid": shape, "tile": layer.grid.tile,
        "chunk": CHUNK, "error": layer.check(),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for row in measured(layer):
        rows.append(row)
        said = ", ".join(f"{name} {ms:.3f}" for name, ms in row.items() if name.endswith(" ms"))
        print(f"{row['direction']}: {said}: {row['of unmasked']:.2f} of unmasked")
        write(given.out, about, rows, complete=False)
    if given.kernels:
        print_kernels(layer)
    write(given.out, about, rows, complete=True)


if __name__ == "__main__":
    main()
