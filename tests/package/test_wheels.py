# SPDX-License-Identifier: Apache-2.0
"""What makes and tries wheels: which Pythons, and what is run in each environment."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TREE / "third_party")
    for name in ("make_wheels", "try_wheels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module("make_wheels"), import_module("try_wheels")


def test_every_python_of_the_project_gets_a_wheel(scripts: Any, tmp_path: Path) -> None:
    make, trial = scripts
    assert make.versions() == ["3.10", "3.11", "3.12", "3.13"]
    with pytest.raises(SystemExit, match=r"^vsa: no Python 3\.99 with venv was found"):
        make.interpreter("3.99")
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert make.interpreter(here).exists()
    assert make.launch_library(Path(sys.executable)).parent.name == (
        f"cmake-{sys.implementation.cache_tag}"
    )
    with pytest.raises(SystemExit, match=r"holds 0 wheels of Python 3\.12$"):
        trial.trial(tmp_path, "3.12", "2.11.0")


def test_what_is_run_in_each_environment_runs(
    scripts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, trial = scripts
    exec(trial.TRIAL, {"__name__": "trial"})
    facts = json.loads(capsys.readouterr().out)
    assert 0 < float(facts["worst"]) < 0.1 and facts["python"].startswith("3.")
