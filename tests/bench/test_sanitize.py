# SPDX-License-Identifier: Apache-2.0
"""bench/sanitize.py: its cases are right on the emulator, and wrong numbers do not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sanitize

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


@pytest.mark.parametrize("part", sanitize.PARTS)
def test_each_part_is_right_on_the_emulator(monkeypatch, part: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitize, "each_kind", lambda: iter([(64, torch.bfloat16)]))
    sanitize.PARTS[part]()


@pytest.mark.parametrize(("wrong", "named"), [("out", "out"), ("gradient", "dq"), ("nan", "out")])
def test_wrong_numbers_end_a_part(monkeypatch, wrong: str, named: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 1.1 * grad

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        if backend == "emulated":
            if wrong == "out":
                return 1.1 * (q + k + v)
            if wrong == "nan":
                return torch.nan * (q + k + v)
            q = Spoiled.apply(q)
        return q + k + v

    given = sanitize.tensors(64, torch.float32, 3, 4)
    with pytest.raises(SystemExit, match=rf"^sanitize\.py: {named} of a case is off by "):
        sanitize.compare("a case", call, given, sanitize.NEAR, backward=True)
    sanitize.compare("a case", lambda q, k, v, backend: q + k + v, given, 1e-6, backward=True)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_tool_looks_at_our_kernels_alone_where_that_hides_nothing(tool: str) -> None:
    given = sanitize.command(tool, "tail")
    assert given[:3] == ["compute-sanitizer", "--tool", tool] and given[-2:] == ["--run", "tail"]
    # What kernels that are left out have written is to initcheck as never written.
    assert ("--kernel-regex" in given) == (tool != "initcheck")
