# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_sharded.py do: steps of the model on a mesh, and in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import vsa
from vsa.training import flow, model, sharded

SIZE = model.Size(128, 2, (4, 8, 8), 1e-3, 50)


def made(kind: str) -> model.VideoTransformer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "two heads", SIZE)
        made = model.VideoTransformer("two heads", kind, vsa.Grid(SIZE.grid), 2)
    torch.manual_seed(0)
    for layer in (made.patch_out, made.time_out):  # at zero they would hide all other gradients
        nn.init.normal_(layer.weight, std=0.1)
    return made


def step(one: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> float:
    """A step of vsa.training.arm, without its clock and average; the norm of the gradient."""
    optimizer.zero_grad()
    flow.clip_losses(one, *batch).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
    optimizer.step()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def four(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("clips", "sequence"))
    for kind in ("vsa", "ramp"):
        alone = made(kind)
        together = copy.deepcopy(alone)
        sharded.shard(together, mesh)
        optimizers = [
            torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-4) for each in (alone, together)
        ]
        for number in range(2):
            if kind == "ramp":
                for each in (alone, together):
                    each.set_topk((0.75, 0.5)[number])
            generator = torch.Generator().manual_seed(number)
            shape = 4, vsa.Grid(SIZE.grid).tokens, model.TOKEN_NUMBERS
            video, noise = torch.randn(2, *shape, generator=generator)
            time = torch.rand(4, generator=generator)
            own = sharded.part(video, mesh), sharded.part(noise, mesh)
            expected = step(alone, optimizers[0], video, noise, time)
            found = step(together, optimizers[1], *own, sharded.part(time, mesh, has_tokens=False))
            assert found == pytest.approx(expected, rel=1e-4) and expected > 0.5
        start, end = made(kind).state_dict(), alone.state_dict()
        for name, weight in together.state_dict().items():
            torch.testing.assert_close(weight.full_tensor(), end[name], rtol=0, atol=2e-6, msg=name)
        assert sum(not torch.equal(start[name], end[name]) for name in end) > 20
    with pytest.raises(TypeError, match=r"blocks\.0\.attention is a DenseAttention with a forward"):
        sharded.shard(made("full"), mesh)
    with pytest.raises(ValueError, match=r"mesh must have two dimensions \(clips, sequence\)"):
        sharded.shard(made("vsa"), mesh["clips"])
    column = init_device_mesh("cpu", (1, 4))
    with pytest.raises(ValueError, match=r"group has 4 ranks .* must divide the 2 heads of blocks"):
        sharded.shard(made("vsa"), column)
