# SPDX-License-Identifier: Apache-2.0
"""Edges of a mask: rules without end, rows without a tile, choices made elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from python.test_masks import GRID, qkv
from torch import Tensor

import vsa
from vsa.masks import ChunkCausal, TeacherForcing, Window
from vsa.values import masks
from vsa.verify import mask_reference, parity

WITHOUT_END = 2**31 - 1, 2**30, 10**30
LAYERS = vsa.Grid((6, 5, 6), tile=(1, 5, 4))


@pytest.mark.parametrize("many", WITHOUT_END)
@pytest.mark.parametrize(
    "rule",
    [
        lambda many: ChunkCausal(2, window=many),
        lambda many: ChunkCausal(2, window=1, sinks=many),
        lambda many: ChunkCausal(2 * many),
        lambda many: TeacherForcing(3 * many),
        lambda many: Window((many, 0, 1)),
        lambda many: Window((0, many, many)),
    ],
)
def test_a_rule_may_say_as_many_as_there_are(rule: Any, many: int) -> None:
    """Kernels count in 32 bits, operators in 64: neither must see a number that is too large."""
    mask = rule(many)
    found = masks.resolve(mask, LAYERS, LAYERS, heads=1)
    assert found is not None and max(found.rule) <= LAYERS.num_tiles
    truth = mask_reference.allowed(mask, LAYERS.shape, LAYERS.tile)
    assert torch.equal(found.matrix(LAYERS.num_tiles, None)[0], truth)


def test_kernels_take_a_window_without_end() -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    q, k, v = (torch.randn(1, *LAYERS.shape, 1, 64).bfloat16() for _ in "qkv")
    for mask in (ChunkCausal(2, window=2**30), Window((2**31 - 1, 0, 0))):
        options: Any = {"grid": LAYERS, "mask": mask, "gate_coarse": q}
        found, of_torch = (
            vsa.attention(q, k, v, 1.0, backend=backend, **options).float()
            for backend in ("emulated", "torch")
        )
        torch.testing.assert_close(found, of_torch, rtol=0.05, atol=0.05)


def test_each_selection_beside_a_mask_is_looked_at() -> None:
    """A call is prepared for all selections of a kind, and only some lie inside."""
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    q, k, v = (torch.randn(1, *GRID.shape, 2, 64).bfloat16() for _ in "qkv")
    mask, n = ChunkCausal(3), GRID.num_tiles
    inside = mask_reference.allowed(mask, GRID.shape, GRID.tile).expand(1, 2, n, n)
    options: Any = {"mask": mask, "backend": "emulated"}
    for _ in range(2):
        vsa.block_sparse_attention(q, k, v, vsa.Selection.from_mask(inside, GRID), **options)
    outside = vsa.Selection.from_mask(torch.ones_like(inside), GRID)
    with pytest.raises(ValueError, match=r"^selection must lie inside of mask"):
        vsa.block_sparse_attention(q, k, v, outside, **options)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_that_may_choose_nothing_has_no_tail_either(gated: bool) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    allowed = torch.ones(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    allowed[1] = False
    idle = GRID.tile_of_token() == 1
    results: list[list[Tensor]] = []
    tensors = [torch.randn(1, *GRID.shape, 2, 64).bfloat16() for _ in range(4)]
    for backend in ("emulated", "torch"):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out, lse = vsa.attention(
            *leaves, 1, grid=GRID, mask=allowed, tail=True, return_lse=True, backend=backend,
            gate_fine=tensors[3] if gated else None,
        )  # fmt: skip
        assert (out.flatten(1, 3)[:, idle] == 0).all() and (lse[..., idle] == -math.inf).all()
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append([out.detach().float(), *(grad.float() for grad in grads)])
    for found, of_torch in zip(*results, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, of_torch, rtol=0.05, atol=0.1)


def test_a_tail_may_begin_late_in_a_row_without_a_choice() -> None:
    """More key tiles than kernels take at a time; a mask hides all of the first ones."""
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    grid, kv_grid = vsa.Grid((1, 1, 8), tile=(1, 1, 4)), vsa.Grid((1, 1, 70), tile=(1, 1, 1))
    q, k, v = (torch.randn(1, each.length, 1, 64).bfloat16() for each in (grid, kv_grid, kv_grid))
    allowed = torch.zeros(2, 70, dtype=torch.bool)
    allowed[:, 66:] = True
    nothing = vsa.Selection.from_mask(torch.zeros(1, 1, 2, 70, dtype=torch.bool), grid, kv_grid)
    found, of_torch = (
        vsa.block_sparse_attention(
            q, k, v, nothing, mask=allowed, tail=True, backend=backend
        ).float()
        for backend in ("emulated", "torch")
    )
    assert of_torch.abs().sum() > 0
    torch.testing.assert_close(found, of_torch, rtol=0.02, atol=0.02)


def test_idle_rows_of_all_forms_have_gradients() -> None:
    """A mask that lets nobody choose anything: zeros everywhere, and no NaN on the way back."""
    allowed = torch.zeros(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    for topk in (1, 1.0, vsa.TopP(0.5)):
        leaves = [x.requires_grad_() for x in qkv()]
        out = vsa.attention(*leaves, topk, grid=GRID, mask=allowed, gate_coarse=leaves[0].detach())
        assert (out == 0).all()
        assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), leaves))


def test_a_choice_by_runs_is_near_only_inside_of_its_mask() -> None:
    """What ``vsa check`` asks where rounding may decide."""
    problem = parity.by_name("window", topk=0.6)
    tensors, allowed = problem.inputs(), problem.allowed()
    assert allowed is not None and not allowed.all()
    _, chosen = parity.expected(problem, tensors)
    assert parity._is_near(problem, tensors, chosen)
    assert not parity._is_near(problem, tensors, chosen | ~allowed)
    worst_first = tensors | {"q": -tensors["q"]}
    assert not parity._is_near(problem, worst_first, chosen)
