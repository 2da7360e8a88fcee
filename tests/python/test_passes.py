# SPDX-License-Identifier: Apache-2.0
"""Heads whose backward is one pass: numbers, the choice, and what keeps to two passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends import BACKENDS
from vsa.backends.kernels import backward, passes
from vsa.stages import eager
from vsa.values.problem import Problem as FineProblem
from vsa.values.problem import Saved, Upstream
from vsa.values.remembered import Remembered
from vsa.verify import parity
from vsa.verify.parity import PROBLEMS, Problem, by_name

TOGETHER = [x for x in PROBLEMS if not (x.prefix or x.suffix)]
Machine = tuple[str, str]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for sums holds NaN, and plans are made anew: what is not zeroed shows."""
    empty = torch.empty

    def filled(*arguments, **options) -> Tensor:
        found = empty(*arguments, **options)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(eager, "_plans", Remembered(256))


@pytest.fixture(params=[False, True], ids=["one-pass", "two-passes"])
def repeats(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether bits have to repeat."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def _lists(shared: list[bool], grid: vsa.Grid, sharing: int = 1) -> vsa.Selection:
    """For each key head the same tiles of every query, or neighbours of different queries."""
    n = grid.num_tiles
    parity_of = [sum(map(int, at)) % 2 for at in torch.ones(grid.tiles).nonzero()]
    mask = torch.zeros(1, len(shared) * sharing, n, n, dtype=torch.bool)
    for head, same in enumerate(shared):
        for row in range(n):
            kept = [j < 4 if same else parity_of[j] == row % 2 for j in range(n)]
            mask[0, head * sharing : (head + 1) * sharing, row] = torch.tensor(kept)
    return vsa.Selection.from_mask(mask, grid)


def _grads(machine: Machine, tensors: list[Tensor], lists: vsa.Selection, upstream: Tensor):
    """dq, dk, dv of the kernels, without a plan."""
    backend, device = machine
    ints, bits = lists.grid.as_ints(), lists.bitmap.to(device)
    q, k, v, grad = (x.to(device) for x in (*tensors, upstream))
    problem = FineProblem(q, k, v, bits, None, ints, ints, 64**-0.5, backend)
    kernels = BACKENDS[backend]
    saved = Saved(*kernels.forward(problem, lists.grid.num_tiles))
    return kernels.backward(Upstream(grad, None), saved, problem, lists.grid.num_tiles)


def _true_grads(tensors: list[Tensor], lists: vsa.Selection, upstream: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in tensors]
    out = vsa.block_sparse_attention(*leaves, lists, backend="torch")
    return list(torch.autograd.grad(out, leaves, upstream.double()))


@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("problem", TOGETHER, ids=lambda problem: problem.name)
def test_error_is_at_most_twice_that_of_sdpa(
    problem: Problem, element: torch.dtype, machine: Machine
) -> None:
    problem = replace(problem, head_dim=64, dtype=element)
    with eager.paused():
        ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name", ["gates", "grouped-query", "large-logits"])
def test_a_plan_takes_as_many_passes(name: str, repeats: bool, machine: Machine) -> None:
    problem = replace(by_name(name), head_dim=64, dtype=torch.bfloat16)
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def test_heads_that_share_their_key_tiles(repeats: bool, machine: Machine) -> None:
    grid = vsa.Grid((8, 8, 9))
    lists = _lists([True, False, True], grid, sharing=2)
    tensors = [torch.randn(1, grid.length, heads, 64).bfloat16() for heads in (6, 3, 3)]
    upstream = torch.randn(1, grid.length, 6, 64).bfloat16()
    found = _grads(machine, tensors, lists, upstream)
    for x, truth in zip(found, _true_grads(tensors, lists, upstream), strict=True):
        assert parity.error(x.cpu(), truth) < 0.01


def test_a_batch_of_heads_of_either_kind(repeats: bool, machine: Machine) -> None:
    grid = vsa.Grid((5, 9, 7))
    one = _lists([True, False], grid).mask()
    lists = vsa.Selection.from_mask(torch.cat([one, one.flip(1)]), grid)
    *tensors, upstream = torch.randn(4, 2, grid.length, 2, 64).half().unbind()
    found = _grads(machine, list(tensors), lists, upstream)
    for x, truth in zip(found, _true_grads(list(tensors), lists, upstream), strict=True):
        assert parity.error(x.cpu(), truth) < 0.002


@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_one_pass_is_as_exact_as_two(magnitude: float, machine: Machine) -> None:
    grid = vsa.Grid((6, 7, 9))
    *tensors, upstream = torch.randn(4, 1, grid.length, 2, 64).bfloat16().unbind()
    tensors[0] *= magnitude
    lists = _lists([True, False], grid)
    truth = _true_grads(list(tensors), lists, upstream)
    errors = []
    for repeats in (False, True):
        torch.use_deterministic_algorithms(repeats)
        try:
            found = _grads(machine, list(tensors), lists, upstream)
        finally:
            torch.use_deterministic_algorithms(False)
        errors.append([parity.error(x.cpu(), y) for x, y in zip(found, truth, strict=True)])
    assert all(one <= 1.1 * two + 1e-4 for one, two in zip(*errors, strict=True)), errors


def test_where_one_pass_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the memory that its sums take."""
    made: list[tuple[int, ...]] = []
    shape = passes.sums_shape

    def note(*arguments) -> tuple[int, ...]:
        made.append(shape(*arguments))
        return made[-1]

    monkeypatch.setattr(backward, "sums_shape", note)
    grid = vsa.Grid((5, 9, 7))
    *tensors, upstream = torch.randn(4, 1, grid.length, 2, 64).bfloat16().unbind()
    lists = _lists([True, False], grid)
    _grads(("emulated", "cpu"), list(tensors), lists, upstream)
    assert made == [(1, 2, grid.num_tiles, 64, 64)]
    torch.use_deterministic_algorithms(True)
    try:
        _grads(("emulated", "cpu"), list(tensors), lists, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) == 1


def test_what_keeps_to_two_passes() -> None:
    plain, text = vsa.Grid((4, 8, 8)), vsa.Grid((4, 8, 8), prefix=3)
    assert passes.may_take_one(64, (plain, plain), padded=False)
    assert not passes.may_take_one(128, (plain, plain), padded=False)
    assert not passes.may_take_one(64, (text, plain), padded=False)
    assert not passes.may_take_one(64, (plain, text), padded=False)
    assert not passes.may_take_one(64, (plain, plain), padded=True)


def test_kernels_refuse_what_they_have_no_pass_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "may_take_one", lambda *_, **__: True)
    monkeypatch.setattr(backward, "sums_shape", lambda *_: (1,))
    grid = vsa.Grid((4, 8, 8))
    *tensors, upstream = torch.randn(4, 1, grid.length, 1, 128).bfloat16().unbind()
    with pytest.raises(RuntimeError, match="grad_q_sums must be null but for heads of 64"):
        _grads(("emulated", "cpu"), list(tensors), _lists([True], grid), upstream)
