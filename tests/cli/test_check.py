# SPDX-License-Identifier: Apache-2.0
"""vsa check: it passes here, and finds what is wrong with a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vsa.backends import BACKENDS, tiles
from vsa.backends.kernels import forward
from vsa.backends.kernels.text import text_of
from vsa.cli import app
from vsa.cli.check import command as check
from vsa.cli.check import low_precision as check_low
from vsa.stages import eager
from vsa.values.remembered import Remembered
from vsa.verify import low_precision, parity

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def test_check_passes_here_and_prints_a_reason_for_each_absent_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other tests hold every backend to all problems; here the command runs on a few of each kind.

    A problem that FlexAttention is held to on a CPU is among them.
    """
    few = {
        "ragged",
        "gates",
        "text",
        "other-keys",
        "tail",
        "sub-blocks",
        "chunk-causal",
        *check.FLEX_PROBLEMS["cpu"],
    }
    problems = [problem for problem in parity.CHECKED if problem.name in few]
    monkeypatch.setattr(parity, "CHECKED", problems)
    cases_of = check_low.cases

    def fewer(row: check_low.Row) -> list[low_precision.Case]:
        """tests/kernels and tests/python hold the emulator and the simulation to all kinds."""
        return [case for case in cases_of(row) if case.name in check_low.ALSO_AT_128]

    monkeypatch.setattr(check_low, "cases", fewer)
    result = RUNNER.invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    assert "exact enough" in result.output and "WRONG" not in result.output
    assert "hopper" in result.output and "cannot run here: it needs" in result.output
    precisions = [line.split()[:3] for line in result.output.splitlines() if "int8" in line]
    assert ["torch", "cpu", "int8"] in precisions and ["emulated", "cpu", "int8"] in precisions


def test_check_fails_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "CHECKED", [parity.by_name("ragged")])
    monkeypatch.setattr(check, "_ratios", lambda *_: {"out": float("nan"), "q": 1.0})
    monkeypatch.setattr(check, "check_low_precision", lambda console: True)
    result = RUNNER.invoke(app, ["check"])
    assert result.exit_code == 1 and "WRONG" in result.output


def test_check_looks_at_few_emulated_problems_beside_a_gpu() -> None:
    names = [
        {problem.name for problem in check._problems(replace(row, beside_a_gpu=beside))}
        for beside in (False, True)
        for row in check._rows()
        if row.backend == "emulated" and row.dtype == torch.bfloat16
    ]
    assert names[0] == {problem.name for problem in parity.CHECKED}
    assert names[1] == set(check.BESIDE_A_GPU)


def test_check_prints_rows_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row stands there before the next one is begun."""
    monkeypatch.setattr(parity, "CHECKED", [parity.by_name("ragged")])
    printed, seen = [], []
    line, ratios = check._line, check._ratios
    monkeypatch.setattr(check, "_line", lambda *a, **o: printed.append(a[0]) or line(*a, **o))

    def noting(problem: Any, row: check.Row) -> dict[str, float]:
        seen.append((len(printed), row.backend))
        return ratios(problem, row)

    monkeypatch.setattr(check, "_ratios", noting)
    monkeypatch.setattr(check, "check_low_precision", lambda console: True)
    assert RUNNER.invoke(app, ["check"]).exit_code == 0
    assert len(seen) > 5 and all(printed[before] == backend for before, backend in seen)


def _spoiled(function: Any, spoil: Any) -> Any:
    return lambda *args, **options: spoil(function(*args, **options), *args, **options)


def _wrong_epilogue(found: Any, *_: Any) -> Any:
    return 1.02 * found[0], found[1]


def _wrong(place: int) -> Any:
    return lambda found, *_, **__: tuple(
        1.02 * x if index == place and x is not None else x for index, x in enumerate(found)
    )


def _nan(found: Any, *_: Any) -> Any:
    found[0].view(-1)[7] = float("nan")
    return found


def _all_real(_: Any, valid: Any, *rest: Any) -> Any:
    return text_of(None, *rest)


EMULATED, TORCH = BACKENDS["emulated"], BACKENDS["torch"]
FAULTS = {
    "gated epilogue": ("emulated", EMULATED, "gated_inference", _wrong_epilogue),
    "combine of training": ("emulated", EMULATED, "gated_forward", _wrong(0)),
    "gradient of gate_fine": ("emulated", EMULATED, "gated_backward", _wrong(3)),
    "gradient of gate_coarse": ("emulated", EMULATED, "gated_backward", _wrong(4)),
    "gradient of k": ("emulated", EMULATED, "gated_backward", _wrong(1)),
    "invalid text": ("emulated", forward, "text_of", _all_real),
    "NaN": ("emulated", EMULATED, "gated_forward", _nan),
    "gates of torch": ("torch", TORCH, "combine", lambda out, *_: 1.02 * out),
    "text of torch": ("torch", tiles, "token_valid", lambda real, *_: real | True),
    "gradient of torch": ("torch", TORCH, "backward", _wrong(2)),
    "choice": ("torch", TORCH, "select", lambda found, *_: (found[0].flip(2), found[1])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, owner, name, spoil = FAULTS[fault]
    monkeypatch.setattr(owner, name, _spoiled(getattr(owner, name), spoil))
    monkeypatch.setattr(eager, "_plans", Remembered(256))  # those of other tests are not spoiled
    problems = [p for p in parity.CHECKED if p.name in ("gates", "text")]
    monkeypatch.setattr(parity, "CHECKED", problems)
    rows = [row for row in check._rows() if row.backend == backend]  # the others are right
    monkeypatch.setattr(check, "_rows", lambda: rows)
    monkeypatch.setattr(check, "check_low_precision", lambda console: True)
    result = RUNNER.invoke(app, ["check"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    verdicts = [line for line in result.output.splitlines() if line.startswith(backend)]
    assert verdicts and all("WRONG" in line for line in verdicts), result.output


LOW_FAULTS = {
    "a wrong output": lambda out, lse: (1.06 * out, lse),
    "a wrong log-sum-exp": lambda out, lse: (out, lse + 0.04),
    "NaN": lambda out, lse: (out.index_fill(1, torch.tensor([3]), torch.nan), lse),
    "a head that is another's": lambda out, lse: (out.roll(1, 2), lse),
}


@pytest.mark.parametrize("backend", ["emulated", "torch"])
@pytest.mark.parametrize("fault", LOW_FAULTS)
def test_check_finds_what_is_wrong_in_low_precision(
    fault: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = BACKENDS[backend]
    compute = owner.low_precision
    spoil = LOW_FAULTS[fault]
    monkeypatch.setattr(owner, "low_precision", lambda *args: spoil(*compute(*args)))
    # One that shows each of them, also by itself: longer ones only take longer.
    cases = [case for case in low_precision.CASES if case.name == "ragged"]
    monkeypatch.setattr(low_precision, "CASES", cases)
    rows = [row for row in check_low.rows() if row.backend == backend]
    assert len(rows) == 2
    monkeypatch.setattr(check_low, "rows", lambda: rows)
    console = Console(width=120, record=True)
    with eager.paused():  # prepared calls do not come by what is spoiled
        assert not check_low.check_low_precision(console)
    verdicts = [x for x in console.export_text().splitlines() if x.startswith(backend)]
    assert len(verdicts) == 2 and all("WRONG" in line for line in verdicts)


def test_emulated_eight_bits_are_few_beside_a_gpu() -> None:
    row = next(row for row in check_low.rows() if row.backend == "emulated")
    names = {case.name for case in check_low.cases(row._replace(beside_a_gpu=True))}
    assert names == set(check_low.BESIDE_A_GPU) and len(check_low.cases(row)) > 25
