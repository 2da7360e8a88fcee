# SPDX-License-Identifier: Apache-2.0
"""Masks over tiles: ``mask=`` against the specification, and what follows from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends import BACKENDS, Request
from vsa.masks import ChunkCausal, TeacherForcing, Window
from vsa.values import masks
from vsa.verify import dense, mask_reference, reference
from vsa.verify.parity import expected, ours, relative_to_sdpa, worst
from vsa.verify.problems import MASKED, Problem, by_name

DOUBLE = 1e-12
GRID = vsa.Grid((6, 5, 6), tile=(3, 5, 4))


def qkv(*shape: int, dtype: torch.dtype = torch.float64, heads: int = 2) -> list[Tensor]:
    shape = shape or GRID.shape
    return list(torch.randn(3, 1, *shape, heads, 16, dtype=torch.float64).to(dtype))


@st.composite
def rules(draw: st.DrawFn) -> tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A mask, a tile that fits it, and the grids of queries and keys."""
    number = st.integers(1, 4)
    unit, h, w = draw(number), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    side = st.sampled_from([1, 2, 3, 4])
    kind = draw(st.sampled_from(["chunks", "forcing", "window"]))
    tile = unit, draw(side), draw(side)
    if kind == "forcing":
        half = unit * draw(number)
        shape = 2 * half, h, w
        return TeacherForcing(unit * draw(number)), tile, shape, shape
    past, shape = unit * draw(st.integers(0, 6)), (unit * draw(number), h, w)
    keys = past + shape[0], h, w
    if kind == "window":
        reach = st.integers(0, 3)
        return Window((draw(reach), draw(reach), draw(reach))), tile, shape, keys
    window = draw(st.none() | number)
    mask = ChunkCausal(unit * draw(number), window=window, sinks=draw(st.integers(0, 3)))
    return mask, tile, shape, keys


@given(case=rules())
@settings(max_examples=120, deadline=None)
def test_a_rule_on_tiles_is_the_rule_on_frames(case: Any) -> None:
    mask, tile, shape, keys = case
    grid, kv_grid = vsa.Grid(shape, tile=tile), vsa.Grid(keys, tile=tile)
    found = masks.resolve(mask, grid, kv_grid, heads=1)
    assert found is not None
    truth = mask_reference.allowed(mask, shape, tile, keys)
    assert torch.equal(found.matrix(grid.num_tiles, None)[0], truth)
    assert torch.equal(found.seen(1, torch.device("cpu"))[0], truth.any(0))
    assert truth.any(1).all(), "under a rule no row is without a tile"
    assert torch.equal(torch.cat(list(found.counts(grid.num_tiles)), 1)[0], truth.sum(1))


@given(case=rules(), topk=st.sampled_from([1, 3, 0.3, 1.0, (2, 0.6), 0.7]), mass=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_grid_is_the_definition(case: Any, topk: Any, mass: bool) -> None:
    mask, tile, shape, keys = case
    tile = tile[0], max(tile[1], 3), max(tile[2], 3)
    budget: Any = vsa.TopP(0.8, floor=topk) if mass and isinstance(topk, float) else topk
    problem = Problem(
        "", grid=shape, kv_grid=keys, tile=tile, topk=budget, mask=mask, gate_coarse=True
    )  # type: ignore[arg-type]
    tensors = problem.inputs()
    truth, chosen = expected(problem, tensors, oracle=dense.attention)
    found, selection = ours(problem, tensors)
    assert torch.equal(selection.mask(), chosen)
    assert worst(found.out, truth.out) < DOUBLE
    for name, grad in truth.grads.items():
        assert worst(found.grads[name], grad) < 10 * DOUBLE, name


@pytest.mark.parametrize("problem", MASKED, ids=lambda problem: problem.name)
def test_attention_is_the_reference(problem: Problem) -> None:
    tensors = problem.inputs()
    truth, mask = expected(problem, tensors)
    for result, chosen in (
        expected(problem, tensors, oracle=dense.attention),
        ours(problem, tensors),
    ):
        chosen = chosen.mask() if isinstance(chosen, vsa.Selection) else chosen
        assert torch.equal(chosen, mask)
        assert worst(result.out, truth.out) < DOUBLE
        assert torch.allclose(result.lse, truth.lse, rtol=1e-12, atol=1e-12)
        for name, grad in truth.grads.items():
            assert worst(result.grads[name], grad) < 10 * DOUBLE, name


@pytest.mark.parametrize("backend", ["torch", "flex", "emulated"])
@pytest.mark.parametrize("problem", MASKED, ids=lambda problem: problem.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_error_is_at_most_twice_that_of_sdpa(problem: Problem, backend: str) -> None:
    gradients = backend != "flex"  # which has none on a CPU
    asked = Request("cpu", None, "torch.bfloat16", 64, gradients, masked=True)
    if (missing := BACKENDS[backend].why_not(asked)) is not None:
        pytest.skip(missing)
    problem = by_name(problem.name, dtype=torch.bfloat16, head_dim=64)
    ratios = relative_to_sdpa(problem, gradients=gradients, backend=backend)
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def by_heads(empty: bool = True) -> Tensor:
    """(heads, n_q, n_k), another for each head; a row of each may choose nothing."""
    n = GRID.num_tiles
    allowed = torch.rand(2, n, n, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[:, torch.arange(n), torch.arange(n)] = True
    if empty:
        allowed[0, 1] = allowed[1, 2] = False
    return allowed


def test_a_tensor_for_each_head_is_the_reference() -> None:
    allowed, tensors = by_heads(), [x.requires_grad_() for x in qkv()]
    gate = torch.randn(1, *GRID.shape, 2, 16, dtype=torch.float64)
    for tail in (False, True):
        out, selection, lse = vsa.attention(
            *tensors, 2, grid=GRID, mask=allowed, gate_coarse=gate, tail=tail,
            return_selection=True, return_lse=True,
        )  # fmt: skip
        flat = [x.flatten(1, 3) for x in (*tensors, gate)]
        truth, chosen, true_lse = reference.attention(
            *flat[:3], 2, grid=GRID.shape, tile=GRID.tile, gate_coarse=flat[3], allowed=allowed,
            tail=tail,
        )  # fmt: skip
        assert torch.equal(selection.mask(), chosen)
        assert worst(out.detach().flatten(1, 3), truth.detach()) < DOUBLE
        assert torch.allclose(lse, true_lse)
        assert (lse == -math.inf).any()
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad((out * upstream).sum(), tensors, retain_graph=True)
        true = torch.autograd.grad((truth * upstream.flatten(1, 3)).sum(), tensors)
        for grad, other in zip(grads, true, strict=True):
            assert worst(grad, other) < 10 * DOUBLE


def test_a_row_that_may_choose_nothing_is_zero() -> None:
    allowed = torch.ones(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    allowed[1] = False
    q, k, v = qkv()
    out, lse = vsa.attention(q, k, v, 0.5, grid=GRID, mask=allowed, return_lse=True)
    idle = GRID.tile_of_token() == 1
    assert (out.flatten(1, 3)[:, idle] == 0).all() and (lse[..., idle] == -math.inf).all()
    assert (out.flatten(1, 3)[:, ~idle] != 0).all() and lse[..., ~idle].isfinite().all()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_no_row_may_choose_reaches_nothing(as_tensor: bool, tail: bool) -> None:
    """Keys and values of a chunk that has left the window are NaN, and so is an idle query."""
    keys, mask = (12, 5, 6), ChunkCausal(3, window=1, sinks=1)
    rule: Any = mask
    grid, kv_grid = GRID, vsa.Grid(keys, tile=GRID.tile)
    q, k, v = qkv()[0], *qkv(*keys)[1:]
    if as_tensor:
        rule = mask_reference.allowed(mask, grid.shape, grid.tile, keys)
        rule[1] = False
    seen = mask_reference.allowed(mask, grid.shape, grid.tile, keys).any(0)
    assert not seen.all()
    lost = ~seen[kv_grid.tile_of_token()].view(keys)
    results = []
    for poison in (1.0, math.nan):
        poisoned = [q.clone(), k.clone(), v.clone()]
        for x in poisoned[1:]:
            x[:, lost] = poison
        leaves = [x.requires_grad_() for x in poisoned]
        out, lse = vsa.attention(
            *leaves, 0.5, grid=grid, kv_grid=kv_grid, mask=rule, tail=tail, return_lse=True,
            gate_coarse=torch.ones(1, 1, 1, 1, 2, 1, dtype=q.dtype),
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out.sum(), leaves), lse])
    for clean, other in zip(*results, strict=True):
        assert other.isfinite().all() or as_tensor
        torch.testing.assert_close(clean, other, rtol=0, atol=0)


def test_a_mask_that_changes_later_is_not_what_a_choice_was_made_under() -> None:
    q, k, v = qkv()
    allowed = torch.ones(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool).tril()
    gate = torch.ones_like(q)
    leaf = q.clone().requires_grad_()
    wanted, chosen = vsa.attention(
        leaf, k, v, 2, grid=GRID, mask=allowed, gate_coarse=gate, return_selection=True
    )
    allowed.fill_(True)
    found = vsa.attention(q, k, v, None, selection=chosen, grid=GRID, gate_coarse=gate)
    torch.testing.assert_close(found, wanted.detach(), rtol=DOUBLE, atol=DOUBLE)
    wanted.sum().backward()  # and autograd has kept nothing that has changed
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_everything_is_dense_attention_under_the_mask() -> None:
    q, k, v = qkv(6, 4, 6)
    mask = TeacherForcing(1)
    out, selection = vsa.attention(q, k, v, 1.0, tile=(1, 4, 4), mask=mask, return_selection=True)
    frame = torch.arange(6 * 4 * 6) // 24
    attends = torch.tensor(
        [[mask_reference.teacher_forcing(t, s, 3, 1) for s in range(6)] for t in range(6)]
    )[frame[:, None], frame]
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
    truth = functional.scaled_dot_product_attention(q, k, v, attends).transpose(1, 2)
    torch.testing.assert_close(out.flatten(1, 3), truth)
    assert selection.most is not None and selection.under is not None


def test_training_and_a_chunk_over_its_past_are_the_same() -> None:
    mask, grid = ChunkCausal(3), (9, 4, 6)
    q, k, v = qkv(*grid)
    gate = torch.randn(1, *grid, 2, 16, dtype=torch.float64)
    options: Any = {"tile": "auto", "mask": mask, "return_selection": True}
    whole, chosen = vsa.attention(q, k, v, 0.4, gate_coarse=gate, **options)
    for chunk in range(3):
        own, past = slice(3 * chunk, 3 * chunk + 3), slice(0, 3 * chunk + 3)
        out, selection = vsa.attention(
            q[:, own], k[:, past], v[:, past], 0.4, kv_grid=(past.stop, 4, 6),
            gate_coarse=gate[:, own], **options,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, own])
        rows = selection.shape[2]
        expected_rows = chosen.mask()[:, :, chunk * rows :][:, :, :rows]
        assert torch.equal(selection.mask(), expected_rows[..., : selection.num_key_tiles])


def test_a_share_is_of_what_a_row_may_choose() -> None:
    q, k, _ = qkv(9, 4, 6)
    for topk in (0.4, 5, 1, (3, 0.4)):
        selection = vsa.select(q, k, topk, tile=(3, 4, 3), mask=ChunkCausal(3))
        kept = selection.mask().sum(-1)[0]
        may = torch.tensor([2, 4, 6]).repeat_interleave(2)
        for head in range(2):
            each = topk[head] if isinstance(topk, tuple) else topk
            least = (may * each).ceil() if isinstance(each, float) else may.clamp(max=each)
            assert torch.equal(kept[head], least.long().clamp(min=1)), topk


def test_best_tile_never_straddles() -> None:
    assert vsa.best_tile((3, 30, 52), frames=3) == (3, 5, 4)
    assert vsa.best_tile((21, 30, 52), frames=3) == (3, 5, 4)
    for frames in range(1, 7):
        for shape in ((5, 9, 7), (12, 4, 4), (21, 30, 52)):
            tile = vsa.best_tile(shape, frames=frames)
            assert frames % tile[0] == 0 and math.prod(tile) <= 64
    _, selection = vsa.attention(
        *qkv(6, 6, 6), 0.5, tile="auto", mask=ChunkCausal(3), return_selection=True
    )
    assert selection.grid is not None and selection.grid.tile == vsa.best_tile((6, 6, 6), frames=3)
