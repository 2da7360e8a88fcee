# SPDX-License-Identifier: Apache-2.0
"""bench/parallel.py: on a CPU with gloo, its shares, and what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import draw
import parallel
import parallel_layer


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(parallel.__file__, "--tiny", *arguments)


def checked(file: Path, ranks: list[int]) -> dict[str, Any]:
    """What every file has: ranks that agree, and the times of all of them."""
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["complete"] and written["gpus"] == max(ranks)
    assert {each["ranks"] for each in written["parity"]} == {*ranks}
    for each in written["parity"]:
        assert each["chosen"] == 0
        gate = ["gate_coarse"] if "a coarse gate" in each["case"] else []
        assert list(each["errors"]) == ["out", "q", "k", "v", *gate]
        assert all(0 <= error < 1e-5 for error in each["errors"].values())
    for row in written["rows"]:
        assert row["ms"] > 0 and (row["ranks"] == 1) == (row["way"] == "")
        assert row["ranks"] == 1 or len(row["per_rank_ms"]) == row["ranks"]
        assert (row["sent"] > 0) == (row["mode"] == "part" and "to" in row["what"])
    return written


def test_ranks_agree_with_one_process_and_all_is_timed(tmp_path: Path) -> None:
    file = tmp_path / "parallel.json"
    more = "--shapes", "tiny", "--repeats", 1, "--no-compile", "--tolerance", 1e-5, "--seconds", 1e6
    done = run(*more, "--out", file)
    assert done.returncode == 0, done.stderr
    written = checked(file, [2])
    cases = [each["case"] for each in written["parity"]]
    assert len(set(cases)) == 1 + len(parallel.MORE_CASES) and any("uneven" in x for x in cases)
    assert all(case in done.stdout for case in cases[:1])
    found = {(row["mode"], row["what"], row["ranks"], row["case"]) for row in written["rows"]}
    for what in parallel_layer.DIRECTIONS:
        assert {("eager", what, ranks, case) for ranks in (1, 2) for case in cases} <= found
    assert {x for mode, x, _, _ in found if mode == "part"} == {
        *("sequence to heads", "kernels", "heads to sequence")
    }
    ways = {row["way"] for row in written["rows"] if row["mode"] == "eager"}
    assert len(ways) == 1 + len(parallel.WAYS)


def test_groups_of_ranks_and_text_on_all_and_what_there_is_no_time_for(tmp_path: Path) -> None:
    file = tmp_path / "parallel.json"
    more = "--ranks", "2,4", "--shapes", "tiny-text", "--seconds", 0, "--repeats", 1
    done = run(*more, "--out", file)
    assert done.returncode == 0, done.stderr
    written = checked(file, [2, 4])
    assert written["left_out"][0] == "gates and uneven shares"
    assert {row["mode"] for row in written["rows"]} == {"eager", "part"}
    assert "left out, for want of time: compiled calls of tiny-text" in done.stdout


def test_a_wrong_result_and_another_choice_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        groups = {"normal": dist.group.WORLD}
        shape, cpu = parallel.TINY["tiny"], torch.device("cpu")
        layer = parallel.Layer("tiny", shape, "even", True, 0.125, groups, cpu)
        assert layer.parity().chosen == 0 and max(layer.parity().errors.values()) < 1e-5
        options = argparse.Namespace(repeats=1)
        session = parallel.Session(options, 0, cpu, 0.0)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        parallel.compiled(session, layer)
        found = [(row.mode, row.what) for row in session.rows]
        assert found == [("compiled", what) for what in parallel_layer.DIRECTIONS]
        right = parallel_layer.ulysses_attention

        def wrong(q: Tensor, k: Tensor, v: Tensor, topk: object, **more: object) -> object:
            return right(q, k, 1.1 * v, topk and 2 * topk, **more)

        monkeypatch.setattr(parallel_layer, "ulysses_attention", wrong)
        parity = layer.parity()
        assert parity.chosen > 0.5 and parity.errors["out"] == pytest.approx(0.1, rel=1e-3)
        assert parity.errors["gate_coarse"] > 0.01
    finally:
        dist.destroy_process_group()


def test_errors_above_the_tolerance_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(function: object, arguments: Any, **_: object) -> None:
        (arguments[1] / parallel.WORST).write_text("0.5")

    monkeypatch.setattr(parallel, "start_processes", work)
    monkeypatch.setattr("sys.argv", ["parallel.py", "--tiny", "--tolerance", "0.4"])
    with pytest.raises(SystemExit, match=r"differ from one process by 5.0e-01, more than 0.4"):
        parallel.main()


def test_the_picture_has_a_line_for_every_shape(tmp_path: Path) -> None:
    row = {"shape": "tiny", "case": draw.EVEN, "mode": "eager", "what": "forward", "way": ""}
    rows = [
        row | {"what": what, "ranks": ranks, "ms": ms}
        for what in draw.theme.DIRECTIONS
        for ranks, ms in ((1, 6.0), (2, 4.0), (2, 3.0), (4, 2.0))
    ]
    assert draw.gains_of(rows[:4]) == {1: 1.0, 2: 1.5, 4: 3.0}
    file = tmp_path / "scaling.png"
    draw.scaling({"rows": rows, "device": "x", "commit": None, "date": "today"}, file)
    assert file.stat().st_size > 1000


def test_shares_add_up_and_are_uneven_only_where_asked() -> None:
    for ranks in (2, 3, 8):
        even, uneven = (parallel_layer.shares(32_760, ranks, kind) for kind in ("even", "uneven"))
        assert sum(even) == sum(uneven) == 32_760
        assert max(even) - min(even) <= 1 and max(uneven) - min(uneven) > 32_760 // ranks // 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", 3], "--ranks 3 must be 2 or more and divide the 8 heads"),
        (["--ranks", 1], "--ranks 1 must be 2 or more"),
        (["--ranks", "two"], "numbers such as 2,4 are needed, not 'two'"),
        (["--shapes", "wan"], "--shapes must be of tiny, tiny-text, but one is 'wan'"),
        (["--out", "/nowhere/at/all.json"], "must lie in a folder that exists"),
    ],
)
def test_what_cannot_run_is_refused_before_processes_start(
    arguments: list[object], words: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and words in " ".join(done.stderr.split())
