# SPDX-License-Identifier: Apache-2.0
"""What a denoising step over a cache costs as a video grows: sparse, dense, and cache.advance().

usage: python bench/streaming.py [--past 18] [--only-full] [--out streaming.json] [--commit HASH]
       python bench/streaming.py --tiny

The layer is that of Wan 1.3B at 480p: chunks of 3 frames of 30 x 52 tokens, tile (3, 5, 4), 12.5 %
of the tiles, with a coarse gate; --past frames before the current chunk fill the cache. A row is
timed while the cache fills, when it is full, and again after two turns of the ring, where a step
has to cost the same. Its columns are the step through the cache; the same in a CUDA graph, captured
once; with the choice of an earlier step; over concatenated keys without a cache; and PyTorch's
dense attention over the cache's keys. Calls are timed by turns. Host microseconds are those until a
call returns, of the step and of the one over concatenated keys. Before that, the step is held to
the one over concatenated keys. --tiny runs all of it in seconds on a CPU, whose times say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.measure.provenance import provenance, write
from vsa.measure.timing import seconds, settled
from vsa.verify.parity import error

CHUNK, TOPK = 3, 0.125
ROUNDS = 9
"""Of timings of all calls; medians count."""
AT_ONCE = 20
"""Calls of a timing of the host: few enough for none to wait for room in a stream."""
OF_HOST = "sparse", "concatenated"
WORST = 0.02
"""Difference to the call over concatenated keys, in bf16."""


class Video:
    """A video that is made chunk by chunk, its cache, and the same keys in the order of time."""

    def __init__(
        self, plane: tuple[int, int], capacity: int, heads: int, device: torch.device
    ) -> None:
        self.device, self.capacity = device, capacity
        self.backend = "hopper" if device.type == "cuda" else "emulated"
        self.chunk = CHUNK, *plane
        head_dim = 128 if device.type == "cuda" else 64
        size = 4, 1, *self.chunk, heads, head_dim
        self.q, self.k, self.v, self.gate = torch.randn(
            size, device=device, dtype=torch.bfloat16
        ).unbind()
        self.cache = vsa.KVCache(1, heads, head_dim, self.chunk, capacity, device=device)
        self.past: list[tuple[Tensor, Tensor]] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, selection: vsa.Selection | None = None) -> Tensor:
        """A denoising step through the cache."""
        topk = TOPK if selection is None else None
        return vsa.attention(
            self.q, self.k, self.v, topk, cache=self.cache, gate_coarse=self.gate,
            selection=selection, backend=self.backend,
        )  # fmt: skip

    def next(self) -> float:
        """The current chunk becomes past and another one comes; microseconds of the host."""
        self.past.append((self.k.clone(), self.v.clone()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.cache.advance()
        took = time.perf_counter() - begin
        for x in (self.q, self.k, self.v, self.gate):
            x.normal_()
        return 1e6 * took

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the step attends, in the order of time."""
        pairs = [*self.past[max(0, len(self.past) + 1 - self.capacity) :], (self.k, self.v)]
        return torch.cat([k for k, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)

    def calls(self) -> dict[str, Callable[[], object]]:
        """All that is timed, by name."""
        k, v = self.held()
        grids = {"kv_grid": tuple(k.shape[1:4]), "tile": self.cache.tile, "backend": self.backend}

        def concatenated() -> Tensor:
            return vsa.attention(self.q, k, v, TOPK, gate_coarse=self.gate, **grids)

        off = error(self.step(), concatenated().double())
        if not off <= WORST:
            raise SystemExit(f"streaming.py: the step is off by {off:.1e}, more than {WORST}")
        _, chosen = vsa.attention(
            self.q, self.k, self.v, TOPK, cache=self.cache, return_selection=True,
            gate_coarse=self.gate, backend=self.backend,
        )  # fmt: skip
        rows, keys, values = (x.flatten(1, 3).transpose(1, 2) for x in (self.q, k, v))
        found: dict[str, Callable[[], object]] = {
            "sparse": self.step,
            "reused": lambda: self.step(chosen),
            "concatenated": concatenated,
            "dense": lambda: functional.scaled_dot_product_attention(rows, keys, values),
        }
        if self.device.type == "cuda" and self.cache.chunks == self.capacity:
            found["graph"] = self._captured().replay
        return found

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Once: it serves all turns of the ring."""
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
        return self.graph


def host_microseconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Until a call returns, whatever the GPU still does. By turns: the host's speed changes."""
    found: dict[str, list[float]] = {name: [] for name in OF_HOST}
    for _ in range(3 * ROUNDS):
        for name, times in found.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(AT_ONCE):
                runs[name]()
            times.append((time.perf_counter() - begin) / AT_ONCE)
    return {f"{name} host us": 1e6 * statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def row_of(video: Video) -> dict[str, Any]:
    """Milliseconds of all calls at this place of the video."""
    device, runs = video.device, video.calls()
    counts = {name: settled(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        for name, run in runs.items():
            times[name] += seconds(run, device, 1, counts[name])
    row: dict[str, Any] = {"chunk": len(video.past), "held": video.cache.chunks}
    row |= {f"{name} ms": statistics.median(found) * 1e3 for name, found in times.items()}
    if device.type == "cuda":  # the emulator's host does the work
        row |= host_microseconds(runs)
    row["faster than dense"] = row["dense ms"] / row.get("graph ms", row["sparse ms"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="streaming.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--past", type=int, default=18, help="frames before the current chunk")
    parser.add_argument("--only-full", action="store_true", help="no rows while the cache fills")
    parser.add_argument("--tiny", action="store_true", help="chunks of 90 tokens, anywhere")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, help="write rows to this .json file")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type != "cuda" and not given.tiny:
        parser.error("the kernels are timed on a Hopper GPU: pass --tiny to see that it runs")
    if given.past % CHUNK:
        parser.error(f"--past must be a multiple of the {CHUNK} frames of a chunk")
    plane, capacity, heads = (
        ((5, 6), 2, 1) if given.tiny else ((30, 52), given.past // CHUNK + 1, 12)
    )
    video = Video(plane, capacity, heads, device)
    about: dict[str, Any] = provenance(
        device, command=["bench/streaming.py", *sys.argv[1:]], commit=given.commit
    )
    about |= {
        "backend": video.backend, "topk": TOPK, "chunk": video.chunk, "tile": video.cache.tile,
        "capacity": capacity, "cache bytes": video.cache.nbytes,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    advances: list[float] = []
    last = 3 * capacity - 1  # two turns after the ring is full
    for chunk in range(last + 1):
        with torch.no_grad():
            video.step()
        if chunk in (capacity - 1, last) or (chunk < capacity and not given.only_full):
            rows.append(row_of(video))
            said = ", ".join(
                f"{name} {value:.3f}"
                for name, value in rows[-1].items()
                if name[-3:] in (" ms", " us")
            )
            print(f"chunk {chunk + 1}, {rows[-1]['held']} held: {said}", flush=True)
            write(given.out, about, rows, complete=False)
        advances.append(video.next())
    about["advance us"] = statistics.median(advances[capacity:])
    print(f"cache.advance() of a full ring: {about['advance us']:.1f} us of the host")
    write(given.out, about, rows, complete=True)


if __name__ == "__main__":
    main()
