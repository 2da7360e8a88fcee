# SPDX-License-Identifier: Apache-2.0
"""The head and the rows of every JSON file, and what measuring leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vsa
from vsa.measure import machine, provenance
from vsa.measure.cpu_profiler import LEVEL, cpu_profile
from vsa.measure.layers import LAYERS, parse_layer
from vsa.measure.timing import peak_memory

CPU = torch.device("cpu")


def test_no_more_than_all_cores_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for waiting, share in ((0.0, 0.0), (1.0, 0.5), (7.3, 1.0)):
        monkeypatch.setattr(os, "getloadavg", lambda load=waiting: (load, load, load))
        assert machine.other_load() == share


def test_a_head_says_when_of_what_on_what_and_by_which_command() -> None:
    found = provenance.provenance(CPU, "numpy", "no-such-package", command=["x.py", "a b"])
    assert tuple(found) == (*provenance.HEAD, "numpy", "no-such-package")
    assert found["command"] == "x.py 'a b'" and found["torch"] == torch.__version__
    assert found["vsa"] == vsa.__version__ and found["device"] == machine.processor()
    assert found["driver"] is None and found["limits"] is None  # of a GPU
    assert found["no-such-package"] is None
    assert provenance.provenance(CPU, commit="abc")["commit"] == "abc"


def test_what_nvidia_smi_does_not_say_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_identity", lambda device: "GPU-0")
    monkeypatch.setattr(machine.subprocess, "run", _not_found)
    assert machine.ask_nvidia_smi("driver_version", torch.device("cuda")) is None
    monkeypatch.setattr(machine, "first_line", lambda *command: " ".join(command))
    asked = machine.ask_nvidia_smi("driver_version", torch.device("cuda"))
    assert asked == "nvidia-smi --id=GPU-0 --query-gpu=driver_version --format=csv,noheader"


def _not_found(*_: Any, **__: Any) -> None:
    raise FileNotFoundError


def test_files_come_back_and_are_replaced_whole(tmp_path: Path) -> None:
    file, head = tmp_path / "x.json", provenance.provenance(CPU) | {"setting": 1}
    provenance.write(None, head, [])
    provenance.write(file, head, [{"ms": 1.0}], complete=False)
    assert provenance.read(file) == head | {"complete": False, "rows": [{"ms": 1.0}]}
    with pytest.raises(TypeError):
        provenance.write(file, head, [{"ms": object()}])
    assert provenance.read(file)["rows"] == [{"ms": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "lacks command"),
        (json.dumps(dict.fromkeys(provenance.HEAD)), "lacks rows"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        provenance.read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        provenance.read(tmp_path / "missing.json")


def test_layers_are_read_as_options_write_them() -> None:
    assert [parse_layer(text) for text in LAYERS] == [((32, 32, 32), 12), ((20, 48, 80), 8)]
    for text in ("4x4:2", "4x4x4", "4x4x0:2", "axbxc:2", "4x4x4:"):
        with pytest.raises(Exception, match="written as 32x32x32:12"):
            parse_layer(text)


def test_measuring_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL, raising=False)
    with cpu_profile():
        assert os.environ[LEVEL] == "99"
    assert LEVEL not in os.environ
    monkeypatch.setenv(LEVEL, "2")
    assert peak_memory(lambda: torch.ones(1000), CPU)[1] == 4000
    assert os.environ[LEVEL] == "2"


def test_importing_sets_nothing_and_the_profiler_says_nothing() -> None:
    script = (
        "import os, torch\nbefore = dict(os.environ)\nimport vsa.measure.timing as timing\n"
        "assert dict(os.environ) == before\n"
        "timing.peak_memory(lambda: torch.ones(10), torch.device('cpu'))\n"
        "assert dict(os.environ) == before"
    )
    environment = {name: value for name, value in os.environ.items() if name != LEVEL}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
