# SPDX-License-Identifier: Apache-2.0
"""Prepared calls whose v and gates arrive after the choice of tiles has been made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vsa
from vsa.stages import eager

GRID = vsa.Grid((3, 5, 6), tile=(2, 3, 4), suffix=5)
FIRST = {"plain": True, "coarse": True, "both": True, "runs": True, "given": False, "tail": False}
"""Kinds of calls, and whether they choose tiles before there are values."""


@pytest.mark.parametrize("kind", FIRST)
def test_what_comes_late_is_not_read_before(
    kind: str, machine: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = machine
    numbers = torch.randn(5, 1, GRID.length, 2, 64, device=device).bfloat16()
    q, k, v, coarse, fine = numbers.unbind()
    gates: dict[str, Tensor | None] = {"gate_coarse": None, "gate_fine": None}
    if kind in ("coarse", "both"):
        gates["gate_coarse"] = coarse
    if kind == "both":
        gates["gate_fine"] = fine
    selection = vsa.select(q, k, 2, grid=GRID, backend=backend) if kind == "given" else None
    score = vsa.SubBlocks(2) if kind == "runs" else "mean"
    topk, tail = (None if kind == "given" else 2), kind == "tail"
    options = {"grid": GRID, "backend": backend, "score": score, "tail": tail}
    expected = vsa.attention(q, k, v, topk, selection=selection, **options, **gates)

    rest = GRID, None, (4, 4, 4), None, backend, score, False, False, tail, None, "native"
    late = [torch.full_like(x, torch.nan) for x in (v, coarse, fine)]
    each = zip(gates.values(), late[1:], strict=True)
    here = [late[0], *(None if gate is None else x for gate, x in each)]
    key = eager.kind_of(q, k, here[0], here[2], here[1], None, selection, topk, rest)
    plan = eager.plan_of(key)
    assert plan is not None and plan.prepared is not None
    programs = []
    run = type(plan.prepared.machine).run_program
    monkeypatch.setattr(
        type(plan.prepared.machine),
        "run_program",
        lambda self, program, *more: programs.append(len(came)) or run(self, program, *more),
    )
    came: list[int] = []

    def ready() -> None:
        for x, y in zip(late, (v, coarse, fine), strict=True):
            x.copy_(y)
        came.append(1)

    tokens = q, k, here[0], here[2], here[1]
    out, _, _ = eager.attend(plan, tokens, None, selection, ready)
    assert torch.equal(out, expected) and came == [1]
    assert programs == ([0, 1] if FIRST[kind] else [1])


def test_a_prepared_call_takes_all_tensors_that_it_numbers() -> None:
    q, k, v = torch.randn(3, 1, GRID.length, 2, 64).bfloat16().unbind()
    rest = GRID, None, (4, 4, 4), None, "emulated", "mean", False, False, False, None, "native"
    key = eager.kind_of(q, k, v, None, None, None, None, 2, rest)
    vsa.attention(q, k, v, 2, grid=GRID, backend="emulated")
    plan = eager.plan_of(key)
    assert plan is not None and plan.prepared is not None
    with pytest.raises(ValueError, match="a prepared call takes 11 tensors, but got 7"):
        plan.prepared.forward(q, k, v, None, None, None, None)
