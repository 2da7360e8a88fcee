# SPDX-License-Identifier: Apache-2.0
"""Heads whose backward is one pass: numbers, the choice, and what keeps to two passes."""

from __future__ import annotations

from collections.abc import Callable
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

NEVER, ALWAYS = 2.0, 0.0
TOGETHER = [x for x in PROBLEMS if not (x.prefix or x.suffix)]
Machine = tuple[str, str]
Ask = Callable[[float], list[Tensor | None]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Sets the share from which on heads take one pass, and returns a list of what is chosen then.

    Memory for sums holds NaN: what is not zeroed shows.
    """
    noted: list[Tensor | None] = []
    choose = passes.choose

    def note(*arguments) -> tuple[Tensor | None, Tensor | None]:
        found = choose(*arguments)
        if found[1] is not None:
            found[1].fill_(float("nan"))
        noted.append(found[0])
        return found

    def asked(least: float) -> list[Tensor | None]:
        monkeypatch.setattr(passes, "LEAST_SHARED", least)
        monkeypatch.setattr(backward, "choose", note)
        monkeypatch.setattr(eager, "_plans", Remembered(256))
        noted.clear()
        return noted

    return asked


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
    problem: Problem, element: torch.dtype, machine: Machine, ask: Ask
) -> None:
    noted = ask(ALWAYS)
    problem = replace(problem, head_dim=64, dtype=element)
    with eager.paused():
        ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios
    assert noted or problem.runs > 1  # a plan chooses for itself
    assert all(x is not None and bool(x.all()) for x in noted)


def test_each_key_head_takes_the_passes_that_suit_its_lists(machine: Machine, ask: Ask) -> None:
    noted = ask(0.5)
    grid, shared = vsa.Grid((8, 8, 9)), [True, False, True]
    lists = _lists(shared, grid, sharing=2)
    tensors = [torch.randn(1, grid.length, heads, 64).bfloat16() for heads in (6, 3, 3)]
    upstream = torch.randn(1, grid.length, 6, 64).bfloat16()
    found = _grads(machine, tensors, lists, upstream)
    assert noted[0] is not None and noted[0].cpu().tolist() == [[1, 0, 1]]
    for x, truth in zip(found, _true_grads(tensors, lists, upstream), strict=True):
        assert parity.error(x.cpu(), truth) < 0.01


@pytest.mark.parametrize("least", [ALWAYS, 0.5, NEVER])
def test_a_batch_of_heads_of_either_kind(least: float, machine: Machine, ask: Ask) -> None:
    ask(least)
    grid = vsa.Grid((5, 9, 7))
    one = _lists([True, False], grid).mask()
    lists = vsa.Selection.from_mask(torch.cat([one, one.flip(1)]), grid)
    *tensors, upstream = torch.randn(4, 2, grid.length, 2, 64).half().unbind()
    found = _grads(machine, list(tensors), lists, upstream)
    for x, truth in zip(found, _true_grads(list(tensors), lists, upstream), strict=True):
        assert parity.error(x.cpu(), truth) < 0.002


def test_one_pass_and_two_agree_where_scores_are_large(machine: Machine, ask: Ask) -> None:
    grid = vsa.Grid((6, 7, 9))
    *tensors, upstream = torch.randn(4, 1, grid.length, 2, 64).bfloat16().unbind()
    tensors[0] *= 100
    lists = _lists([True, False], grid)
    truth = _true_grads(list(tensors), lists, upstream)
    errors = []
    for least in (ALWAYS, NEVER):
        ask(least)
        found = _grads(machine, list(tensors), lists, upstream)
        errors.append([parity.error(x.cpu(), y) for x, y in zip(found, truth, strict=True)])
    assert all(one <= 1.1 * two + 1e-4 for one, two in zip(*errors, strict=True)), errors


def test_what_keeps_to_two_passes() -> None:
    plain, text = vsa.Grid((4, 8, 8)), vsa.Grid((4, 8, 8), prefix=3)
    assert passes.may_take_one(64, (plain, plain), padded=False)
    assert not passes.may_take_one(128, (plain, plain), padded=False)
    assert not passes.may_take_one(64, (text, plain), padded=False)
    assert not passes.may_take_one(64, (plain, text), padded=False)
    assert not passes.may_take_one(64, (plain, plain), padded=True)


def test_bits_repeat_where_they_have_to(machine: Machine, ask: Ask) -> None:
    noted = ask(ALWAYS)
    grid = vsa.Grid((5, 9, 7))
    *tensors, upstream = torch.randn(4, 1, grid.length, 2, 64).bfloat16().unbind()
    lists = _lists([True, False], grid)
    torch.use_deterministic_algorithms(True)
    try:
        _grads(machine, list(tensors), lists, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert noted == [None]


@pytest.mark.parametrize("must_repeat", [False, True])
def test_a_plan_takes_as_many_passes(must_repeat: bool, machine: Machine, ask: Ask) -> None:
    ask(ALWAYS)
    problem = replace(by_name("gates"), head_dim=64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(must_repeat)
    try:
        ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(ratio <= 2 for ratio in ratios.values()), ratios
