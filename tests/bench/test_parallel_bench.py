# SPDX-License-Identifier: Apache-2.0
"""bench/parallel.py: on a CPU with gloo, its shares, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch.distributed as dist
from torch import Tensor

import parallel


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(parallel.__file__, "--device", "cpu", *arguments)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_process_and_all_is_timed(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "parallel.json"
    done = run("--ranks", ranks, "--repeats", 2, "--tolerance", 1e-5, "--out", file)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["ranks"] == ranks and written["shape"] == "tiny"
    cases = [each["case"] for each in written["parity"]]
    assert len(set(cases)) == len(parallel.CASES) and any("uneven" in case for case in cases)
    for each in written["parity"]:
        assert each["chosen"] == 0 and each["case"] in done.stdout
        gate = ["gate_coarse"] if "a coarse gate" in each["case"] else []
        assert list(each["errors"]) == ["out", "q", "k", "v", *gate]
        assert all(0 <= error < 1e-5 for error in each["errors"].values())
    timed = [(row["what"], row["ranks"]) for row in written["rows"] if row["case"] == cases[0]]
    assert timed[:4] == [("forward", 1), ("backward", 1), ("forward", ranks), ("backward", ranks)]
    assert len(timed) == 7 and all(row["ms"] > 0 for row in written["rows"])
    assert all((row["sent"] > 0) == ("to" in row["what"]) for row in written["rows"])


def test_errors_above_the_tolerance_fail_the_command() -> None:
    done = run("--repeats", 1, "--tolerance", -1)
    assert done.returncode == 1 and "differ from one process by" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_result_and_another_choice_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        options = SimpleNamespace(device="cpu", repeats=1, share=0.125)
        case = parallel.Case("even", True, parallel.TINY, options)
        assert case.parity().chosen == 0 and max(case.parity().errors.values()) < 1e-5
        right = parallel.ulysses_attention

        def wrong(q: Tensor, k: Tensor, v: Tensor, topk: object, **more: object) -> object:
            return right(q, k, 1.1 * v, topk and 2 * topk, **more)

        monkeypatch.setattr(parallel, "ulysses_attention", wrong)
        parity = case.parity()
        assert parity.chosen == 1 and parity.errors["out"] == pytest.approx(0.1, rel=1e-3)
        assert parity.errors["gate_coarse"] > 0.01
    finally:
        dist.destroy_process_group()


def test_shares_add_up_and_are_uneven_only_where_asked() -> None:
    for ranks in (2, 3, 8):
        even, uneven = (parallel.shares(32_760, ranks, kind) for kind in ("even", "uneven"))
        assert sum(even) == sum(uneven) == 32_760
        assert max(even) - min(even) <= 1 and max(uneven) - min(uneven) > 32_760 // ranks // 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", 3], "--ranks 3 must be 2 or more and divide the 4 heads"),
        (["--ranks", 1], "--ranks 1 must be 2 or more"),
        (["--device", "cuda", "--ranks", 64], "--ranks 64 needs as many GPUs"),
        (["--out", "/nowhere/at/all.json"], "must lie in a folder that exists"),
    ],
)
def test_what_cannot_run_is_refused_before_processes_start(
    arguments: list[object], words: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr
