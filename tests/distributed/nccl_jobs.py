# SPDX-License-Identifier: Apache-2.0
"""What processes with a GPU each do: exchanges by NCCL beside our own kernels."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import vsa
from vsa.distributed import ulysses_attention
from vsa.distributed.text import parted

VIDEO = vsa.Grid((7, 18, 26))
TEXT = vsa.Grid((7, 18, 26), suffix=37)
CLOSE = 1e-2
"""Distance from one process as a share of the norm; the choice of tiles is the same."""


class Problem:
    """A layer, whole and in parts, on the current GPU."""

    def __init__(self, grid, gated, lengths, **options):
        self.grid, self.rank, self.ranks = grid, dist.get_rank(), dist.get_world_size()
        self.lengths = lengths or [
            len(part) for part in torch.arange(grid.tokens).tensor_split(self.ranks)
        ]
        made = torch.randn(4 + gated, 1, grid.length, 8, 128, device="cuda").bfloat16()
        dist.broadcast(made, 0)
        *self.whole, self.upstream = made.unbind()
        self.whole = [x.clone().requires_grad_() for x in self.whole]
        self.mine = [self.part(x).detach().clone().requires_grad_() for x in self.whole]
        self.settings = {"topk": 0.25, "grid": grid}
        self.sharding = {"lengths": lengths, "text": "replicated" if grid.text else "sharded"}
        self.sharding |= options

    def part(self, x, of_text=1):
        prefix, video, suffix = parted(x, self.grid)
        video = video.split(self.lengths, dim=1)[self.rank]
        return torch.cat([prefix / of_text, video, suffix / of_text], dim=1)

    def attend(self, function, xs, **more):
        q, k, v, *gate = xs
        gates = {"gate_coarse": gate[0]} if gate else {}
        return function(q, k, v, **self.settings, **gates, **more)

    def together(self):
        return self.attend(ulysses_attention, self.mine, **self.sharding)

    def both(self):
        out = self.together()
        return out, *torch.autograd.grad(out, self.mine, self.part(self.upstream, self.ranks))

    def agrees(self):
        out = self.attend(vsa.attention, self.whole)
        wanted = [out, *torch.autograd.grad(out, self.whole, self.upstream)]
        for number, (found, whole) in enumerate(zip(self.both(), wanted, strict=True)):
            prefix, video, suffix = parted(found.detach().float(), self.grid)
            if number and suffix.numel():  # gradients of text come in parts
                suffix = suffix.contiguous()
                dist.all_reduce(suffix)
            found, whole = torch.cat([prefix, video, suffix], dim=1), self.part(whole).float()
            assert (found - whole).norm() < CLOSE * whole.norm(), number


def two(rank):
    torch.manual_seed(0)
    for head_groups in (None, 1, 2, 4):
        Problem(VIDEO, False, None, head_groups=head_groups).agrees()
    uneven = [len(part) for part in torch.arange(VIDEO.tokens).tensor_split(dist.get_world_size())]
    uneven[0], uneven[1] = uneven[0] - 301, uneven[1] + 301
    Problem(VIDEO, True, uneven, head_groups=2).agrees()
    Problem(TEXT, True, None, head_groups=2).agrees()
    nobody_waits()
    captured()
    compiled()


def nobody_waits():
    problem = Problem(VIDEO, True, None, head_groups=2)
    problem.both()
    with torch.no_grad():
        problem.together()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.both()
        with torch.no_grad():
            problem.together()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured():
    problem = Problem(VIDEO, True, None, head_groups=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.both()
    with torch.no_grad():
        for x in problem.mine:
            x.normal_()
    graph.replay()
    found = [x.clone() for x in results]
    for one, other in zip(found, problem.both(), strict=True):
        assert (one - other).float().norm() < CLOSE * other.float().norm()


def compiled():
    problem = Problem(VIDEO, True, None, head_groups=2)
    expected = problem.both()
    eager = problem.together
    problem.together = torch.compile(eager, fullgraph=True, dynamic=False)
    for one, other in zip(problem.both(), expected, strict=True):
        assert (one - other).float().norm() < CLOSE * other.float().norm()


def four(rank):
    two(rank)
    mesh = init_device_mesh("cuda", (2, 2))
    problem = Problem(VIDEO, True, [936, 936, 702, 702], group=mesh)
    problem.agrees()
