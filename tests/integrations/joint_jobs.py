# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_diffusers_parallel.py do with transformers of joint attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integrations.parallel_jobs import agree, parallel
from integrations.tiny_transformers import (
    BATCH,
    cogvideox,
    hunyuan,
    hunyuan15,
    ltx,
    mochi,
    run,
    wan,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vsa.integrations.diffusers import apply_vsa, collect, remove_vsa

GRID = (5, 6, 7)
UNEVEN = (5, 3, 7)
FAMILIES = (hunyuan, hunyuan15, cogvideox, mochi)


def pair(family: Any, grid: tuple[int, int, int], **settings: Any) -> tuple[Any, Any, Any]:
    """A sparse model, a copy whose video is on all ranks, and inputs."""
    torch.manual_seed(0)
    model, inputs = family(grid)
    # CogVideoX and HunyuanVideo 1.5 begin with projections that are zero.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    twin = copy.deepcopy(model)
    apply_vsa(model, tile=(2, 3, 4), **settings)
    apply_vsa(twin, tile=(2, 3, 4), group=dist.group.WORLD, **settings)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "to_gate_compress" in name:
            nn.init.normal_(one, std=0.2)
            other.data.copy_(one)
    return model, twin, inputs


def two(rank: int) -> None:
    for family in FAMILIES:
        for grid in (GRID, UNEVEN):
            model, twin, inputs = pair(family, grid, topk=(3, 5), gates="coarse")
            agree(model, twin, inputs)
        model, twin, inputs = pair(family, UNEVEN, topk=0.3, dense_layers=[0], gates="coarse")
        agree(model, twin, inputs)
        twin.enable_gradient_checkpointing()
        agree(model, twin, inputs)
    steps_and_removal()
    copies_and_compilation()
    for family in FAMILIES:
        sharded_weights(family)
    refused()


@torch.no_grad()
def steps_and_removal() -> None:
    """Steps: dense, chosen, taken again; then diffusers' own attention on the whole."""
    model, twin, inputs = pair(hunyuan, UNEVEN, topk=2, dense_steps=1, refresh_every=2)
    dense = run(remove_vsa(copy.deepcopy(model)), inputs)
    for timestep in (900.0, 800.0, 700.0):
        step = {**inputs, "timestep": torch.full((BATCH,), timestep)}
        torch.testing.assert_close(run(twin, step), run(model, step), rtol=1e-4, atol=1e-5)
    # The sharded dense pass is ours, so it is close to diffusers', not its bits.
    apply_vsa(twin, topk=2, dense_layers=[0, 1], group=dist.group.WORLD)
    torch.testing.assert_close(run(twin, inputs), dense, rtol=1e-4, atol=1e-5)
    remove_vsa(twin)
    assert torch.equal(run(twin, inputs), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


def sharded_weights(family: Any) -> None:
    """FSDP2 over the same ranks: its means of gradients in parts are half their sums."""
    model, twin, inputs = pair(family, UNEVEN, topk=3, gates="coarse")
    mesh = init_device_mesh("cpu", (2,))
    for path in twin._vsa_plan.layers:
        fully_shard(twin.get_submodule(path), mesh=mesh)
    fully_shard(twin, mesh=mesh)
    for one in (model, twin):
        run(one, inputs).square().sum().backward()
    sharded = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = 2 * sharded[name].grad.full_tensor()
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def copies_and_compilation() -> None:
    model, twin, inputs = pair(hunyuan, GRID, topk=3)
    expected = run(model, inputs)
    other = copy.deepcopy(twin)
    remove_vsa(twin)
    torch.testing.assert_close(run(other, inputs), expected, rtol=1e-4, atol=1e-5)
    # compile_repeated_blocks does this too, and compiles blocks of the text that are not ours.
    for path in other._vsa_plan.layers:
        other.get_submodule(path).compile(backend="eager")
    torch.testing.assert_close(run(other, inputs), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def refused() -> None:
    model, twin, inputs = pair(hunyuan, GRID, topk=3)
    with (
        collect(twin),
        pytest.raises(NotImplementedError, match="collect cannot look at a transformer whose"),
    ):
        run(twin, inputs)
    with pytest.raises(NotImplementedError, match=r"has no plan: .* apply_vsa\(transformer, topk="):
        run(parallel(model, cp_plan={}), inputs)
    for family in (wan, ltx):
        with pytest.raises(NotImplementedError, match=r"call enable_parallelism\(config="):
            apply_vsa(family()[0], topk=3, group=dist.group.WORLD)
    model, _ = hunyuan()
    mesh = init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match=r"group must have one dimension, .* a mesh of 2x1"):
        apply_vsa(model, topk=3, group=mesh)
    with pytest.raises(TypeError, match="group must be a process group"):
        apply_vsa(model, topk=3, group=2)
    sharded, _ = wan()
    fully_shard(sharded.blocks[1], mesh=init_device_mesh("cpu", (2,)))
    # A gate that FSDP2 does not know would learn on each rank for itself.
    with pytest.raises(ValueError, match=r"blocks\.1, .* call apply_vsa before fully_shard"):
        apply_vsa(sharded, topk=3, gates="coarse")
    apply_vsa(sharded, topk=3)
    model.register_to_config(image_condition_type="token_replace")
    with pytest.raises(NotImplementedError, match="group must be None where image_condition_type"):
        apply_vsa(model, topk=3, group=dist.group.WORLD)
    assert not hasattr(model, "_vsa_plan")


def four(rank: int) -> None:
    """Two heads cannot be shared out over four ranks, but two groups of two can."""
    with pytest.raises(
        ValueError, match=r"has 4 ranks, which cannot share out 2 heads .* use 1, 2"
    ):
        apply_vsa(hunyuan()[0], topk=3, group=dist.group.WORLD)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("videos", "heads"))
    torch.manual_seed(mesh.get_local_rank("videos"))
    model, inputs = mochi(UNEVEN)
    twin = copy.deepcopy(model)
    apply_vsa(model, topk=3)
    apply_vsa(twin, topk=3, group=mesh["heads"])
    with torch.no_grad():
        torch.testing.assert_close(run(twin, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
