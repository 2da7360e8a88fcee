# SPDX-License-Identifier: Apache-2.0
"""The experiment of ``vsa demo``: dense and sparse attention on the same clip, and recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.cli.demo import clip as clips
from vsa.cost import Flops
from vsa.measure.machine import input_dtype, machine, other_load
from vsa.stages.inputs import Tile
from vsa.values import checks
from vsa.values.grid import SLOTS

REPEATS = 3
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of key tiles at which recall is measured, besides the user's own and all of them."""
WARM_UP_TILES = 8
"""Query tiles of the calls before the first timed ones: they start threads and load kernels."""
DENSE_WORK, SPARSE_WORK, RECALL_WORK = 5.0, 1.0, 1.0
"""Seconds of a dense run, a sparse run and recall at a density on two cores, for the bar."""
TOTAL_WORK = REPEATS * (DENSE_WORK + SPARSE_WORK) + DENSE_WORK + 12 * RECALL_WORK + 6


@dataclass(eq=False)
class Run:
    """One attention, measured.

    Attributes:
        attend: (q, k, v) to the output.
        out: like q.
        gradients: of q, k and v.
        forwards: seconds of every repeat's forward.
        boths: seconds of its forward and backward together.
    """

    attend: Callable[..., Tensor]
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: tuple[Tensor, ...] = ()
    forwards: list[float] = field(default_factory=list)
    boths: list[float] = field(default_factory=list)

    @property
    def forward(self) -> float:
        """Seconds, median."""
        return median(self.forwards)

    @property
    def both(self) -> float:
        """Seconds of forward and backward together, median."""
        return median(self.boths)

    @property
    def range(self) -> float:
        """How far repeats lie apart, as a share of the median; the larger of both times."""
        return max((max(x) - min(x)) / median(x) for x in (self.forwards, self.boths))

    def repeat(self, leaves: Sequence[Tensor], gradient: Tensor) -> None:
        """Forward and backward once, on the clock."""
        device = gradient.device
        synchronize = torch.get_device_module(device).synchronize
        synchronize(device)
        begin = time.perf_counter()
        out = self.attend(*leaves)
        synchronize(device)
        self.forwards.append(time.perf_counter() - begin)
        self.gradients = torch.autograd.grad(out, leaves, gradient)
        synchronize(device)
        self.boths.append(time.perf_counter() - begin)
        self.out = out.detach()


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that the table and the picture show.

    Attributes:
        clip: the clip.
        grid: its tokens in tiles.
        q: (1, S, heads, head_dim).
        k: like q.
        selection: the tiles that the sparse run chose.
        count: key tiles that it keeps of each query tile.
        dense: PyTorch's attention.
        sparse: this project's.
        everything: this project's with every tile kept, its output and the gradients of q, k and v:
            how far it is from ``dense`` is rounding.
        token_recall: (heads, S), share of its dense attention mass that each token keeps.
        recall: kept tiles -> (heads,) recall of the chosen tiles.
        random_recall: kept tiles -> (heads,) recall of as many tiles drawn at random.
        cost: floating-point operations of forward and backward.
        backend: what ran the fine stage.
        machine: the processor, its threads and PyTorch's version.
        load: other programs' share of this CPU's cores before anything ran; 0 where not known.
    """

    clip: clips.Clip
    grid: vsa.Grid
    q: Tensor
    k: Tensor
    selection: vsa.Selection
    count: int
    dense: Run
    sparse: Run
    everything: tuple[Tensor, ...]
    token_recall: Tensor
    recall: dict[int, Tensor]
    random_recall: dict[int, Tensor]
    cost: Flops
    backend: str
    machine: str
    load: float

    @property
    def flops(self) -> tuple[float, float]:
        """Operations of dense and of sparse attention, which runs without a coarse output here."""
        return self.cost.full, self.cost.select + self.cost.fine


def measure(
    clip: clips.Clip,
    tile: Tile,
    topk: float,
    backend: str,
    device: torch.device,
    seed: int,
    step: Callable[[float, str], None],
) -> Findings:
    """Dense and sparse attention on the clip; ``step`` hears how much is done and what follows."""
    step(2, "making q, k and v")
    load = other_load()
    grid = vsa.Grid(clip.grid, tile=tile)
    q, k, v = leaves = tuple(
        x.flatten(1, 3).to(device, input_dtype(device)).requires_grad_()
        for x in clips.queries_keys_values(clip)
    )
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(q.shape, generator=generator).to(q)

    def attend(q: Tensor, k: Tensor, v: Tensor, budget: float = topk, **more: Any) -> Any:
        return vsa.attention(q, k, v, budget, grid=grid, backend=backend, **more)

    dense, sparse = Run(_dense), Run(attend)
    _warm_up(leaves, backend)
    for _ in range(REPEATS):  # in turn, so that what else runs here disturbs both alike
        step(SPARSE_WORK, "dense attention")
        dense.repeat(leaves, gradient)
        step(DENSE_WORK, "sparse attention")
        sparse.repeat(leaves, gradient)
    step(SPARSE_WORK, "sparse attention with all tiles")
    out, dense_lse = attend(q, k, v, 1.0, return_lse=True)
    everything = out.detach(), *torch.autograd.grad(out, leaves, gradient)
    dense_lse = dense_lse.detach()

    own = checks.top_k(topk, grid.num_tiles)
    counts = sorted({own, *(checks.top_k(share, grid.num_tiles) for share in DENSITIES)})
    with torch.no_grad():

        def token_recall(selection: vsa.Selection) -> Tensor:
            step(RECALL_WORK, "recall")
            _, lse = vsa.block_sparse_attention(
                q, k, v, selection, return_lse=True, backend=backend
            )
            return (lse - dense_lse).exp()[0].cpu()

        step(DENSE_WORK, "recall")
        # As shares, since of many tiles a whole number 1 is asked about.
        selections = {
            count: vsa.select(q, k, (count - 0.5) / grid.num_tiles, grid=grid) for count in counts
        }
        chosen = {count: token_recall(selection) for count, selection in selections.items()}
        drawn = torch.rand(1, q.shape[2], grid.num_tiles, grid.num_tiles, generator=generator)
        order = drawn.argsort(-1).argsort(-1).to(device)
        random = {
            count: token_recall(vsa.Selection.from_mask(order < count, grid)) for count in counts
        }
        for recall in (chosen, random):  # of all tiles, which needs no measuring
            recall[grid.num_tiles] = torch.ones_like(chosen[own])
        step(2, "drawing")
    return Findings(
        clip=clip,
        grid=grid,
        q=q.detach(),
        k=k.detach(),
        selection=selections[own],
        count=own,
        dense=dense,
        sparse=sparse,
        everything=everything,
        token_recall=chosen[own],
        recall={count: each.mean(-1) for count, each in chosen.items()},
        random_recall={count: each.mean(-1) for count, each in random.items()},
        cost=vsa.flops(grid, q.shape[2], q.shape[3], own),
        backend=backend,
        machine=machine(device),
        load=load,
    )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention on (B, S, heads, head_dim)."""
    q, k, v = (rearrange(x, "b s n d -> b n s d") for x in (q, k, v))
    return rearrange(functional.scaled_dot_product_attention(q, k, v), "b n s d -> b s n d")


def _warm_up(leaves: Sequence[Tensor], backend: str) -> None:
    """Both attentions on a few tokens: what PyTorch does only once is done before the clock."""
    q, k, v = few = [x[:, : WARM_UP_TILES * SLOTS].detach().requires_grad_() for x in leaves]
    grid = vsa.Grid((1, 1, q.shape[1]), tile=(1, 1, SLOTS))
    for out in (_dense(q, k, v), vsa.attention(q, k, v, 0.5, grid=grid, backend=backend)):
        torch.autograd.grad(out.sum(), few)
