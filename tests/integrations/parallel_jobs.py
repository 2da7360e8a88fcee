# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_diffusers_parallel.py do: a module that they can import themselves."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from integrations.tiny_transformers import BATCH, ltx, run, wan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from vsa.integrations.diffusers import apply_vsa, collect, remove_vsa

EVEN = (5, 6, 7)


def parallel(model: nn.Module, ring: int = 1, **more: Any) -> nn.Module:
    """A copy of the model, its sequence on two ranks."""
    # diffusers asks for an accelerator even if the mesh is one of CPUs
    torch.accelerator.device_count = lambda: 1
    # diffusers logs by a method that exists only where transformers has been imported
    logging.Logger.warning_once = logging.Logger.warning
    mesh = init_device_mesh("cpu", (ring, 2 // ring), mesh_dim_names=("ring", "ulysses"))
    plan = more.pop("cp_plan", None)
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=2 // ring, mesh=mesh, **more)
    twin = copy.deepcopy(model)
    twin.enable_parallelism(config=config, cp_plan=plan)
    return twin


def agree(model: nn.Module, twin: nn.Module, inputs: dict[str, Any]) -> None:
    """Outputs are those of one process, and gradients of weights add up to its own."""
    results = []
    for one in (model, twin):
        one.zero_grad()
        out = run(one, inputs)
        out.square().sum().backward()
        results.append(out.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    theirs = dict(twin.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = theirs[name].grad.clone()
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
        compared += 1
    assert compared > 20


def problem(family: Any, grid: tuple[int, int, int], **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, inputs = family(grid)
    if family is ltx:  # its text is sharded too
        inputs |= {"encoder_hidden_states": torch.randn(BATCH, 6, 16)}
        inputs["encoder_attention_mask"] = None
    apply_vsa(model, tile=(2, 3, 4), **settings)
    for name, parameter in model.named_parameters():
        if "to_gate_compress" in name:
            nn.init.normal_(parameter, std=0.2)
    return model, inputs


def two(rank: int) -> None:
    for family in (wan, ltx):
        model, inputs = problem(family, EVEN, topk=(3, 5), gates="coarse")
        twin = parallel(model)
        if family is wan:
            agree(model, twin, inputs)
        # diffusers' own cross-attention of LTX has no backward for text of another length.
        with torch.no_grad():
            expected = run(model, inputs)
            torch.testing.assert_close(run(twin, inputs), expected, rtol=1e-4, atol=1e-5)
        # Uneven shards would need NCCL, for diffusers' own gathering of the output.
        model, inputs = problem(family, EVEN, topk=0.3, dense_layers=[0])
        with torch.no_grad():
            expected = run(model, inputs)
            sharded = run(parallel(model, ulysses_anything=True), inputs)
        torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-5)
    checkpointed_and_compiled()
    reused()
    refused()


def checkpointed_and_compiled() -> None:
    model, inputs = problem(wan, EVEN, topk=3)
    twin = parallel(model)
    twin.enable_gradient_checkpointing()
    agree(model, twin, inputs)
    twin.disable_gradient_checkpointing()
    with torch.no_grad():
        expected = run(model, inputs)
        twin.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(run(twin, inputs), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def reused() -> None:
    """Steps: dense, chosen, taken again; and apply_vsa after enable_parallelism."""
    model, inputs = wan(EVEN)
    twin = parallel(model)
    for one in (model, twin):
        apply_vsa(one, topk=2, tile=(2, 3, 4), dense_steps=1, refresh_every=2)
    for timestep in (900.0, 800.0, 700.0):
        step = {**inputs, "timestep": torch.full((BATCH,), timestep)}
        step["hidden_states"] = inputs["hidden_states"] * timestep / 900
        torch.testing.assert_close(run(twin, step), run(model, step), rtol=1e-4, atol=1e-5)
    remove_vsa(model), remove_vsa(twin)
    torch.testing.assert_close(run(twin, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def refused() -> None:
    model, inputs = problem(wan, EVEN, topk=3)
    with pytest.raises(NotImplementedError, match=r"ring_degree=2\), which cannot be exact"):
        run(parallel(model, ring=2), inputs)
    twin = parallel(model)
    with (
        collect(twin),
        pytest.raises(NotImplementedError, match="collect cannot look at a transformer whose"),
    ):
        run(twin, inputs)
