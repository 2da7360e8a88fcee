# SPDX-License-Identifier: Apache-2.0
"""PyTorch's FlopCounterMode over ``vsa.attention``: what ``vsa.flops`` counts, products alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vsa

RAGGED = vsa.Grid((4, 6, 9), prefix=3)
BACKENDS = ["torch", "emulated"]


def inputs(grid: vsa.Grid, kv_heads: int = 2, batch: int = 1):
    sizes = [(batch, grid.length, heads, 64) for heads in (2, kv_heads, kv_heads)]
    return [torch.randn(size).bfloat16().requires_grad_() for size in sizes]


def counted(tensors, backward: bool, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        out = vsa.attention(*tensors, *arguments, **options)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("topk", [2, 0.25, (1, 3)], ids=str)
def test_choice_and_fine_stage_count_as_in_vsa_flops(backend, backward, topk) -> None:
    for grid, kv_heads in ((RAGGED, 1), (vsa.Grid((4, 8, 16)), 2)):
        wanted = vsa.flops(grid, 2, 64, topk, backward=backward, batch=2)
        tensors = inputs(grid, kv_heads, batch=2)
        found = counted(tensors, backward, topk, grid=grid, backend=backend)
        assert found == pytest.approx(wanted.select + wanted.fine, abs=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tiles_are_the_products_of_dense_attention(backend) -> None:
    grid = vsa.Grid((4, 8, 8))
    q, k, v = inputs(grid)
    found = counted((q, k, v), True, 1.0, grid=grid, backend=backend)
    with FlopCounterMode(display=False) as counter:
        scores = torch.einsum("bshd,bthd->bhst", q, k)
        torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    assert found == pytest.approx(3.5 * counter.get_total_flops())  # backward: five products


@pytest.mark.parametrize("backward", [False, True])
def test_our_kernels_count_the_coarse_branch_too(backward: bool) -> None:
    tensors = inputs(RAGGED)
    gate = torch.randn(1).bfloat16().requires_grad_()
    wanted = vsa.flops(RAGGED, 2, 64, 2, backward=backward)
    products = 4 * 2 * 64 * RAGGED.num_tiles**2 * (3.5 if backward else 1)
    found = counted(tensors, backward, 2, grid=RAGGED, gate_coarse=gate, backend="emulated")
    assert found == pytest.approx(products + wanted.fine)  # one product for choice and coarse
    with torch.no_grad():
        found = counted(tensors, False, 2, grid=RAGGED, gate_coarse=gate, backend="emulated")
    once = vsa.flops(RAGGED, 2, 64, 2, backward=False)
    assert found == pytest.approx(4 * 2 * 64 * RAGGED.num_tiles**2 + once.fine)


def test_a_mass_is_counted_by_what_it_came_to() -> None:
    q, k, v = inputs(RAGGED)
    selection = vsa.select(q, k, vsa.TopP(0.5), grid=RAGGED)
    found = counted((q, k, v), False, None, selection=selection, backend="torch")
    wanted = vsa.flops(RAGGED, 2, 64, 1, backward=False)
    one_tile = 4 * 2 * 64 * RAGGED.tokens * RAGGED.tokens / RAGGED.num_tiles
    tiles = selection.density * RAGGED.num_tiles
    assert 1 < tiles < RAGGED.num_tiles
    assert found == pytest.approx(wanted.fine + one_tile * (tiles - 1), abs=1)


def test_without_numbers_the_bound_counts() -> None:
    wanted = vsa.flops(RAGGED, 2, 64, 2, backward=False)
    with FakeTensorMode():
        found = counted(inputs(RAGGED), False, 2, grid=RAGGED, backend="torch")
    assert found == pytest.approx(wanted.select + wanted.fine, abs=1)


@pytest.mark.parametrize("first", ["vsa", "torch.utils.flop_counter"])
def test_registered_in_either_order_and_only_when_asked_for(first: str) -> None:
    second = {"vsa": "torch.utils.flop_counter"}.get(first, "vsa")
    code = (
        f"import sys, {first}\n"
        "print('torch.utils.flop_counter' in sys.modules)\n"
        f"import torch, {second}\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "q, k, v = torch.randn(3, 1, 4, 4, 8, 1, 16).unbind()\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    vsa.attention(q, k, v, 1)\n"
        "print(counter.get_total_flops())\n"
        "print(sum(type(x).__name__ == '_Registrar' for x in sys.meta_path))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, total, left = done.stdout.splitlines()
    assert loaded == str(first != "vsa") and left == "0"
    assert int(total) == 2 * 16 * 2 * 2 + 4 * 16 * 128 * 64  # scores of tile means, one tile each
