# SPDX-License-Identifier: Apache-2.0
"""A video that comes chunk by chunk, and the call over keys that a cache stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vsa
from vsa.values.grid import Extent

Pair = tuple[Tensor, Tensor]
KINDS = [
    pytest.param({}, id="plain"),
    pytest.param({"gate_coarse": True}, id="coarse"),
    pytest.param({"gate_coarse": True, "gate_fine": True}, id="both-gates"),
    pytest.param({"tail": True, "gate_coarse": True}, id="tail"),
    pytest.param({"score": vsa.SubBlocks(2)}, id="sub-blocks"),
]


@dataclass
class Stream:
    """Random chunks, and what a cache of the same settings has to hold.

    Attributes:
        chunk: tokens of a chunk.
        capacity: of the cache.
        sinks: likewise.
        tile: of both.
        heads: of the queries.
        kv_heads: of the keys.
        batch: B.
        head_dim: channels.
        prefix: text tokens.
        dtype: of all tensors.
        device: likewise.
        past: keys and values of all chunks so far.
        text: keys and values of the text.
    """

    chunk: Extent = (2, 3, 5)
    capacity: int = 3
    sinks: int = 1
    tile: Extent = (2, 2, 3)
    heads: int = 2
    kv_heads: int = 1
    batch: int = 2
    head_dim: int = 16
    prefix: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    past: list[Pair] = field(default_factory=list)
    text: Pair | None = None

    def cache(self) -> vsa.KVCache:
        """An empty one."""
        return vsa.KVCache(
            self.batch,
            self.kv_heads,
            self.head_dim,
            self.chunk,
            self.capacity,
            sinks=self.sinks,
            tile=self.tile,
            prefix=self.prefix,
            dtype=self.dtype,
            device=self.device,
        )

    def queries(self) -> Tensor:
        """(B, T, H, W, heads, head_dim)."""
        return self._random(*self.chunk, self.heads)

    def pair(self) -> Pair:
        """(B, T, H, W, kv_heads, head_dim) each."""
        return self._random(*self.chunk, self.kv_heads), self._random(*self.chunk, self.kv_heads)

    def keys_of_text(self) -> Pair:
        """(B, prefix, kv_heads, head_dim) each; from now on those of this stream."""
        self.text = (
            self._random(self.prefix, self.kv_heads),
            self._random(self.prefix, self.kv_heads),
        )
        return self.text

    def _random(self, *shape: int) -> Tensor:
        rows = torch.randn(self.batch, *shape, self.head_dim, dtype=torch.float64)
        return rows.to(self.device, self.dtype)

    def held(self, current: Pair) -> list[Pair]:
        """Keys and values of [sinks | window | current]."""
        chunks = [*self.past, current]
        ring = self.capacity - self.sinks
        rest = chunks[self.sinks :]
        return [*chunks[: self.sinks], *rest[max(0, len(rest) - ring) :]]

    def plain(self, q: Tensor, current: Pair, topk: Any, **options: Any) -> Any:
        """``vsa.attention`` without a cache, over concatenated keys; q may be flat, behind text."""
        chunks = self.held(current)
        k, v = (torch.cat([pair[side] for pair in chunks], dim=1) for side in (0, 1))
        frames, h, w = self.chunk[0] * len(chunks), *self.chunk[1:]
        kv_grid = vsa.Grid((frames, h, w), self.tile, self.prefix)
        text = q.shape[1] - vsa.Grid(self.chunk, self.tile).tokens if q.ndim == 4 else 0
        if self.text is not None:
            q = q.flatten(1, 3) if q.ndim == 6 else q
            k, v = (
                torch.cat((of_text, x.flatten(1, 3)), 1)
                for of_text, x in zip(self.text, (k, v), strict=True)
            )
            gates = ("gate_fine", "gate_coarse")
            for name in gates:
                gate = options.get(name)
                if gate is not None and gate.ndim == 6:
                    options[name] = gate.flatten(1, 3)
        grid = vsa.Grid(self.chunk, self.tile, text)
        return vsa.attention(q, k, v, topk, grid=grid, kv_grid=kv_grid, **options)


def steps(stream: Stream, chunks: int, of_each: int = 2) -> Iterator[tuple[bool, Tensor, Pair]]:
    """Chunks, each denoised so often: whether it is the chunk's last step, queries, keys."""
    for _ in range(chunks):
        for step in range(of_each):
            pair = stream.pair()
            yield step + 1 == of_each, stream.queries(), pair
        stream.past.append(pair)


def with_gates(options: dict[str, Any], q: Tensor) -> dict[str, Any]:
    """Gates like q in place of those that are wanted."""
    made = {name: torch.randn_like(q) for name in options if name.startswith("gate_")}
    return {**options, **made}
