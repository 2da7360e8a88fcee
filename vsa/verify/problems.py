# SPDX-License-Identifier: Apache-2.0
"""Random problems: shapes and options of calls that every backend is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vsa.values.budget import TopP
from vsa.values.grid import Grid
from vsa.values.masks import ChunkCausal, Rule, TeacherForcing, Window
from vsa.verify import mask_reference


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call of ``vsa.attention`` on flat tensors."""

    name: str
    grid: tuple[int, int, int] = (5, 6, 7)
    tile: tuple[int, int, int] = (4, 4, 4)
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    topk: float | TopP | Sequence[float] = 3
    prefix: int = 0
    suffix: int = 0
    kv_grid: tuple[int, int, int] | None = None
    text_valid: bool = False
    gate_coarse: bool = False
    gate_fine: bool = False
    magnitude: float = 1.0
    scale: float | None = None
    tail: bool = False
    runs: int = 1
    mask: Rule | None = None
    dtype: torch.dtype = torch.float64

    @property
    def query_grid(self) -> Grid:
        """The queries' grid."""
        return Grid(self.grid, tile=self.tile, prefix=self.prefix, suffix=self.suffix)

    @property
    def key_grid(self) -> Grid:
        """The keys' grid."""
        return (
            self.query_grid
            if self.kv_grid is None
            else replace(self.query_grid, shape=self.kv_grid)
        )

    def without_extras(self) -> Problem:
        """The same shapes without text, gates and tail, which PyTorch's attention has not."""
        return replace(
            self,
            prefix=0,
            suffix=0,
            text_valid=False,
            gate_coarse=False,
            gate_fine=False,
            tail=False,
        )

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, the gates and an upstream gradient, all random."""
        generator = torch.Generator().manual_seed(seed)

        def normal(length: int, heads: int) -> Tensor:
            x = torch.randn(
                self.batch, length, heads, self.head_dim, generator=generator, dtype=torch.float64
            )
            return x.to(self.dtype)

        queries, keys = self.query_grid.length, self.key_grid.length
        tensors = {
            "q": normal(queries, self.heads) * self.magnitude,
            "k": normal(keys, self.kv_heads),
            "v": normal(keys, self.kv_heads),
        }
        if self.gate_coarse:
            tensors["gate_coarse"] = normal(queries, self.heads)
        if self.gate_fine:
            tensors["gate_fine"] = normal(queries, self.heads)
        return tensors | {
            "upstream": normal(queries, self.heads),
            "upstream_lse": normal(queries, self.heads)[..., 0],
        }

    def valid(self) -> Tensor | None:
        """(B, prefix + suffix): about half of the text is real, another half for each batch."""
        if not self.text_valid:
            return None
        return (
            torch.rand(
                self.batch, self.prefix + self.suffix, generator=torch.Generator().manual_seed(7)
            )
            < 0.5
        )

    def allowed(self) -> Tensor | None:
        """(n_q, n_k): what rows may choose, None for all."""
        if self.mask is None:
            return None
        return mask_reference.allowed(self.mask, self.grid, self.tile, self.kv_grid)


PROBLEMS = [
    Problem("ragged"),
    Problem("divisible", grid=(4, 8, 4), topk=1),
    Problem("dense", topk=1.0, gate_coarse=True),
    Problem("gates", gate_coarse=True, gate_fine=True, batch=2),
    Problem("grouped-query", heads=6, kv_heads=2, gate_coarse=True),
    Problem("multi-query", heads=3, kv_heads=1),
    Problem("share", grid=(3, 9, 10), topk=0.3, gate_fine=True),
    Problem("mass", grid=(3, 9, 10), topk=TopP(0.7, floor=2), gate_coarse=True),
    Problem("per-head", topk=(2, 0.6), batch=2),
    Problem("odd-tile", grid=(7, 10, 8), tile=(3, 5, 4), topk=4),
    Problem("flat-tile", grid=(2, 9, 9), tile=(1, 8, 8), topk=2, gate_coarse=True),
    Problem("tiny-tile", grid=(2, 3, 3), tile=(1, 1, 1), topk=5, gate_coarse=True),
    Problem("prime-tile", grid=(3, 4, 7), tile=(1, 2, 3), topk=4),
    Problem("corner-of-one", grid=(5, 5, 5), topk=2, gate_coarse=True, heads=1, kv_heads=1),
    Problem("prefix", grid=(4, 5, 6), prefix=5, topk=2, gate_coarse=True),
    Problem("suffix", grid=(4, 5, 6), suffix=70, topk=2),
    Problem(
        "text",
        grid=(4, 5, 6),
        prefix=3,
        suffix=6,
        topk=2,
        text_valid=True,
        batch=3,
        gate_coarse=True,
        gate_fine=True,
    ),
    Problem("other-keys", kv_grid=(9, 5, 6), topk=4, gate_coarse=True, heads=4, kv_heads=2),
    Problem("large-logits", magnitude=100.0, gate_coarse=True),
    Problem("scale", scale=0.7, head_dim=8),
    Problem("tail", tail=True, heads=4, kv_heads=2),
    Problem(
        "tail-gates-text",
        grid=(5, 5, 6),
        prefix=3,
        suffix=6,
        topk=2,
        text_valid=True,
        batch=3,
        gate_coarse=True,
        gate_fine=True,
        tail=True,
    ),
    Problem("tail-other-keys", kv_grid=(9, 5, 6), topk=(2, 0.6), batch=2, tail=True),
    Problem("tail-large-logits", magnitude=100.0, tail=True, gate_fine=True),
    Problem("sub-blocks", grid=(3, 9, 10), topk=4, runs=4, gate_coarse=True, batch=2),
    Problem(
        "sub-blocks-mass",
        kv_grid=(9, 5, 6),
        topk=TopP(0.7, floor=2),
        runs=3,
        heads=4,
        gate_fine=True,
    ),
    Problem("one-dimensional", grid=(1, 1, 200), tile=(1, 1, 64), topk=2, gate_coarse=True),
]

MASKED = [
    Problem(
        "chunk-causal",
        grid=(6, 5, 6),
        tile=(3, 5, 4),
        topk=0.6,
        gate_coarse=True,
        gate_fine=True,
        mask=ChunkCausal(3),
        batch=2,
    ),
    Problem(
        "chunk-causal-window",
        grid=(2, 5, 6),
        kv_grid=(9, 5, 6),
        tile=(1, 4, 4),
        prefix=3,
        topk=(5, 0.4),
        gate_coarse=True,
        mask=ChunkCausal(2, window=2, sinks=1),
        tail=True,
    ),
    Problem(
        "teacher-forcing",
        grid=(8, 4, 6),
        tile=(2, 4, 4),
        topk=TopP(0.7),
        gate_coarse=True,
        mask=TeacherForcing(2),
        heads=4,
    ),
    Problem(
        "window",
        grid=(5, 6, 7),
        tile=(2, 3, 3),
        topk=4,
        gate_coarse=True,
        mask=Window((1, 0, 1)),
        runs=2,
    ),
]
"""Problems with a mask over tiles."""


def by_name(name: str, **changes: Any) -> Problem:
    """A problem of the list, changed."""
    return replace(
        next(problem for problem in PROBLEMS + MASKED if problem.name == name), **changes
    )
