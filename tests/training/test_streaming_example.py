# SPDX-License-Identifier: Apache-2.0
"""The example of streaming trains, generates and draws as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = "--simulated --most 4 --steps 1 --dim 16 --depth 1 --timed 3 4 4 2"


def test_the_cache_gives_what_the_mask_of_training_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by the extra demo")
    monkeypatch.syspath_prepend(EXAMPLES)
    file = tmp_path / "streaming.png"
    script = runpy.run_path(str(EXAMPLES / "streaming.py"))
    run = script["main"]([*TINY.split(), "--out", str(file)])
    assert len(run.losses) == 4 and max(run.losses) < 3
    assert 0 < run.difference < 1e-5
    assert {name: len(took) for name, took in run.milliseconds.items()} == {"dense": 2, "sparse": 2}
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "outputs by mask and by cache differ by" in capsys.readouterr().out
