# SPDX-License-Identifier: Apache-2.0
"""Tile means: their kernel's source on a CPU, and the kernel on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import backend_on, on_both
from torch import Tensor

import vsa
from vsa.backends import torch_coarse
from vsa.stages.coarse import tile_means
from vsa.verify import reference

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

ELEMENTS = [torch.bfloat16, torch.float16, torch.float32]


def means_by_definition(x: Tensor, grid: vsa.Grid) -> Tensor:
    tiles = reference.tiles_of(grid.shape, grid.tile, grid.prefix)
    return torch.stack([x.double()[:, tokens].mean(1) for tokens in tiles], dim=2)


def means(machine: str, x: Tensor, grid: vsa.Grid) -> Tensor:
    return backend_on(machine).tile_means([x.to(machine)], [grid])[0].cpu()


@st.composite
def grids(draw) -> vsa.Grid:
    shape = draw(st.tuples(*[st.integers(1, 9)] * 3))
    tile = draw(
        st.sampled_from([(4, 4, 4), (3, 5, 4), (1, 8, 8), (2, 2, 4), (1, 1, 64), (3, 3, 7)])
        | st.tuples(*[st.integers(1, 4)] * 3)
    )
    return vsa.Grid(shape, tile, draw(st.integers(0, 5)), draw(st.integers(0, 5)))


@on_both
@given(
    grid=grids(),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8, 16, 24, 64]),
    element=st.sampled_from(ELEMENTS),
)
@settings(max_examples=40, deadline=None)
def test_means_are_the_definition(
    grid: vsa.Grid, heads: int, head_dim: int, element: torch.dtype, machine: str
) -> None:
    x = torch.randn(2, grid.length, heads, head_dim).to(element)
    found = means(machine, x, grid)
    truth = means_by_definition(x, grid)
    assert found.shape == truth.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(found, torch_coarse.tile_means(x, grid), rtol=1e-6, atol=1e-6)


@on_both
@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat((x, x, x), 2)[:, :, :4],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (0, 3))[..., :64],
        lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    ],
    ids=["fused", "heads-first", "odd-strides", "misaligned", "every-other-head"],
)
def test_means_do_not_depend_on_where_values_lie(view, element: torch.dtype, machine: str) -> None:
    grid = vsa.Grid((5, 6, 7), prefix=2)
    x = torch.randn(2, grid.length, 4, 64).to(element)
    x = x.to(machine)
    assert torch.equal(view(x), x) and not view(x).is_contiguous()
    assert torch.equal(means(machine, view(x), grid), means(machine, x, grid))


@on_both
def test_expanded_batches_and_poisoned_text(machine: str) -> None:
    grid = vsa.Grid((3, 5, 9), (2, 4, 4), prefix=3, suffix=2)
    x = torch.randn(1, grid.length, 2, 16, device=machine)
    clean = means(machine, x.expand(3, -1, -1, -1), grid)
    x[:, :3] = x[:, -2:] = float("nan")
    assert torch.equal(clean, means(machine, x, grid).expand(3, -1, -1, -1))


@on_both
def test_three_tensors_of_their_own_grids_in_one_launch(machine: str) -> None:
    grid, kv_grid = vsa.Grid((5, 6, 7)), vsa.Grid((9, 4, 3), prefix=1)
    q = torch.randn(2, grid.length, 6, 32).bfloat16()
    k, v = torch.randn(2, 2, kv_grid.length, 2, 32).bfloat16()
    together = backend_on(machine).tile_means(
        [x.to(machine) for x in (q, k, v)], [grid, kv_grid, kv_grid]
    )
    for found, x, own in zip(together, (q, k, v), (grid, kv_grid, kv_grid), strict=True):
        assert torch.equal(found.cpu(), means(machine, x, own))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_mean_is_spread_evenly(dtype: torch.dtype) -> None:
    grid, kv_grid = vsa.Grid((3, 5, 6), prefix=2, suffix=1), vsa.Grid((2, 4, 4), (2, 2, 2))
    q = torch.randn(2, grid.length, 2, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(2, kv_grid.length, 1, 8, dtype=dtype, requires_grad=True)
    found = tile_means((q, k), (grid, kv_grid), "torch")
    upstream = [torch.randn_like(x) for x in found]
    grads = torch.autograd.grad(found, (q, k), upstream)
    for x, own, up, grad in zip((q, k), (grid, kv_grid), upstream, grads, strict=True):
        (truth,) = torch.autograd.grad(means_by_definition(x, own), x, up.double())
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, truth, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert grads[0][:, [0, 1, -1]].abs().max() == 0


def test_means_whose_gradient_nobody_wants_cost_nothing() -> None:
    grid = vsa.Grid((3, 5, 6))
    q, k = (x.requires_grad_() for x in torch.randn(2, 1, grid.length, 2, 8).unbind())
    q_means, _ = tile_means((q, k), (grid, grid), "torch")
    grads = torch.autograd.grad(q_means.sum(), (q, k), allow_unused=True)
    assert grads[0] is not None and grads[1] is None


def test_means_operator_passes_opcheck() -> None:
    grid = vsa.Grid((3, 5, 6), prefix=1)
    xs = [torch.randn(2, grid.length, heads, 8, requires_grad=True) for heads in (2, 1)]
    torch.library.opcheck(torch.ops.vsa.tile_means, (xs, grid.as_ints() * 2, "torch"))


@on_both
def test_gradients_of_means_do_not_depend_on_who_computed_them(machine: str) -> None:
    grid = vsa.Grid((5, 6, 9), prefix=2)
    x = torch.randn(2, grid.length, 4, 64, device=machine, requires_grad=True)
    grads = [
        torch.autograd.grad(tile_means((x,), (grid,), name)[0].square().sum(), x)[0]
        for name in (backend_on(machine).name, "torch")
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
