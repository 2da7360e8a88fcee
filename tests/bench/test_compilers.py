# SPDX-License-Identifier: Apache-2.0
"""bench/compilers.py: its tables, and what it says of a release that fails or differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

import compilers
import sass

FORWARD = sass.Kernel("FineForward Li128E Bf16", 128, 0, 0, 0, 700, 40, 64, 250, 12, 32)


def test_tables_say_which_releases_hold_the_budgets_and_which_code_was_measured() -> None:
    measured = compilers.Result(compilers.MEASURED, [FORWARD], "", ["a"])
    other = compilers.Result(
        "13.2.86", [replace(FORWARD, overlapped=0)], "ptxas info : (C7517) Potential", ["b"]
    )
    broken = compilers.Result("13.5.37", failed="nvcc fatal : Unsupported")
    text = compilers.table([measured, other, broken]).splitlines()
    assert text[2] == "| 13.0.88 | none | none | 1 of 1 kernels |"
    fault = "forward bf16 d128: 0 exponentials instead of 32 beside products"
    assert text[3] == f"| 13.2.86 | C7517 | {fault} | 0 of 1 kernels |"
    assert text[4] == "| 13.5.37 | | does not compile: nvcc fatal : Unsupported | |"
    assert text[-1] == "| forward bf16 d128 | 250, 32, 0 | 250, 0, 0 |"


def test_without_the_measured_release_nothing_is_said_to_be_the_same() -> None:
    text = compilers.table([compilers.Result("13.2.86", [FORWARD], "", ["a"])])
    assert "not compiled here" in text


def test_unknown_releases_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compilers.main(["--only", "11.0"])
    assert "13.0.88" in capsys.readouterr().err


def test_what_does_not_compile_is_a_row(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise SystemExit("nvcc failed on x.cu:\nnote: y\nx.cu(3): error: z\n")

    monkeypatch.setattr(compilers, "toolkit", lambda release, scratch: tmp_path / "nvcc")
    monkeypatch.setattr(sass, "compile_kernels", fails)
    result = compilers.compiled("13.2.86", tmp_path, "nvdisasm")
    assert result.failed == "x.cu(3): error: z"
