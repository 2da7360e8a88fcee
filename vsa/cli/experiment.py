# SPDX-License-Identifier: Apache-2.0
"""The experiment of ``vsa demo``: dense and sparse attention on the same clip, and recall."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

import vsa
from vsa import checks
from vsa.cli import clip as clips
from vsa.cli import options
from vsa.flops import Flops
from vsa.inputs import Tile

REPEATS = 3
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Shares of key tiles at which recall is measured, besides the user's own."""
DENSE_WORK, SPARSE_WORK, RECALL_WORK = 6.0, 1.0, 2.0
"""Seconds of a dense run, a sparse run and a dense forward on two cores, for the progress bar."""
TOTAL_WORK = (1 + REPEATS) * (DENSE_WORK + SPARSE_WORK) + 10 * RECALL_WORK + 4


@dataclass(frozen=True, eq=False)
class Run:
    """One attention, measured.

    Attributes:
        out: like q.
        gradients: of q, k and v.
        forward: seconds, median.
        both: seconds of forward and backward together, median.
    """

    out: Tensor
    gradients: tuple[Tensor, ...]
    forward: float
    both: float


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
        token_recall: (heads, S), share of its dense attention mass that each token keeps.
        recall: kept tiles -> (heads,) recall of the chosen tiles.
        random_recall: kept tiles -> (heads,) recall of as many tiles drawn at random.
        cost: floating-point operations of forward and backward.
        backend: what ran the fine stage.
        machine: the processor, its threads and PyTorch's version.
    """

    clip: clips.Clip
    grid: vsa.Grid
    q: Tensor
    k: Tensor
    selection: vsa.Selection
    count: int
    dense: Run
    sparse: Run
    token_recall: Tensor
    recall: dict[int, Tensor]
    random_recall: dict[int, Tensor]
    cost: Flops
    backend: str
    machine: str

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
    grid = vsa.Grid(clip.grid, tile=tile)
    q, k, v = (
        x.flatten(1, 3).to(device, input_dtype(device)).requires_grad_()
        for x in clips.queries_keys_values(clip)
    )
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(q.shape, generator=generator).to(q)
    step(2, "dense attention")
    dense = _run(_dense, (q, k, v), gradient, lambda: step(DENSE_WORK, "dense attention"))
    sparse = _run(
        lambda q, k, v: vsa.attention(q, k, v, topk, grid=grid, backend=backend),
        (q, k, v),
        gradient,
        lambda: step(SPARSE_WORK, "sparse attention"),
    )

    own = checks.top_k(topk, grid.num_tiles)
    counts = sorted({own, *(checks.top_k(share, grid.num_tiles) for share in DENSITIES)})
    with torch.no_grad():
        _, dense_lse = vsa.attention(q, k, v, 1.0, grid=grid, return_lse=True, backend=backend)

        def token_recall(selection: vsa.Selection) -> Tensor:
            _, lse = vsa.block_sparse_attention(
                q, k, v, selection, return_lse=True, backend=backend
            )
            return (lse - dense_lse).exp()[0].cpu()

        step(2 * RECALL_WORK, "recall of the chosen tiles")
        selections = {count: vsa.select(q, k, count, grid=grid) for count in counts}
        chosen = {count: token_recall(selection) for count, selection in selections.items()}
        step(4 * RECALL_WORK, "recall of random tiles")
        drawn = torch.rand(1, q.shape[2], grid.num_tiles, grid.num_tiles, generator=generator)
        order = drawn.argsort(-1).argsort(-1).to(device)
        random = {
            count: token_recall(vsa.Selection.from_mask(order < count, grid)) for count in counts
        }
        step(4 * RECALL_WORK, "drawing")
    return Findings(
        clip=clip,
        grid=grid,
        q=q.detach(),
        k=k.detach(),
        selection=selections[own],
        count=own,
        dense=dense,
        sparse=sparse,
        token_recall=chosen[own],
        recall={count: each.mean(-1) for count, each in chosen.items()},
        random_recall={count: each.mean(-1) for count, each in random.items()},
        cost=vsa.flops(grid, q.shape[2], q.shape[3], own),
        backend=backend,
        machine=options.machine(device),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention on (B, S, heads, head_dim)."""
    q, k, v = (rearrange(x, "b s n d -> b n s d") for x in (q, k, v))
    return rearrange(functional.scaled_dot_product_attention(q, k, v), "b n s d -> b s n d")


def _run(
    attention: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    gradient: Tensor,
    tick: Callable[[], None],
) -> Run:
    """Forward and backward, once to warm up and ``REPEATS`` times on the clock."""
    device = gradient.device
    synchronize = torch.get_device_module(device).synchronize
    forward, both = [], []
    for _ in range(1 + REPEATS):
        synchronize(device)
        begin = time.perf_counter()
        out = attention(*leaves)
        synchronize(device)
        forward.append(time.perf_counter() - begin)
        gradients = torch.autograd.grad(out, leaves, gradient)
        synchronize(device)
        both.append(time.perf_counter() - begin)
        tick()
    return Run(out.detach(), gradients, median(forward[1:]), median(both[1:]))


def input_dtype(device: torch.device) -> torch.dtype:
    """What models run in there: the GPU kernels take bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
