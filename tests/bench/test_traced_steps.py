# SPDX-License-Identifier: Apache-2.0
"""bench/traced_steps.py; and that calls do not become dearer to compile by the way."""

from __future__ import annotations

import sys

import pytest
import torch

import traced_steps

MOST = {"plain": 3000, "gates": 3700, "mask": 4200, "layer": 4300, "drop_in": 3500}
"""Of PyTorch 2.13 and Python 3.11, a sixth more than there are (bench/log/traced-steps.md)."""


@pytest.mark.parametrize("case", traced_steps.CASES)
def test_a_call_is_traced_in_few_steps(case: str) -> None:
    steps, frames = traced_steps.traced(case)
    torch.compiler.reset()
    assert min(frames.values()) >= 1 and 500 < steps.total() < MOST[case]


def test_the_command_counts_what_is_asked_for(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["traced_steps.py", "plain", "--top", "1"])
    traced_steps.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("plain: ") and first.endswith(" frames") and " in 1 frames: " in second
    monkeypatch.setattr(sys, "argv", ["traced_steps.py", "hello"])
    with pytest.raises(SystemExit):
        traced_steps.main()
    assert "CASE must be one of plain, gates, mask, layer, drop_in, but" in capsys.readouterr().err
