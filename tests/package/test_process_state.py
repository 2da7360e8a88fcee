# SPDX-License-Identifier: Apache-2.0
"""A test that changes the process that others run in is told so: conftest.py asks this of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from process_state import changes, process_state

CUDA = torch.backends.cuda
SETTINGS: dict[str, tuple[Callable[[object], object], object, object]] = {
    "flash attention": (CUDA.enable_flash_sdp, False, True),
    "memory efficient attention": (CUDA.enable_mem_efficient_sdp, False, True),
    "attention by plain products": (CUDA.enable_math_sdp, False, True),
    "cuDNN's attention": (CUDA.enable_cudnn_sdp, False, True),
    "default dtype": (torch.set_default_dtype, torch.float64, torch.float32),
    "precision of float32 products": (torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic algorithms": (torch.set_deterministic_debug_mode, "error", "default"),
    "threads": (torch.set_num_threads, 3, 1),
    "gradients": (torch.set_grad_enabled, False, True),
    "autocast": (lambda on: torch.set_autocast_enabled("cpu", on), True, False),
    "anomaly detection": (torch.autograd.set_detect_anomaly, True, False),
    "default device": (torch.set_default_device, "meta", None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_stays_changed_is_named(name: str) -> None:
    change, value, usual = SETTINGS[name]
    before = process_state()
    assert not changes(before)
    try:
        change(value)
        found = changes(before)
    finally:
        change(usual)
    assert len(found) == 1 and found[0].startswith(f"{name} was "), found
    assert not changes(before)


def test_another_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, here = process_state(), Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert changes(before) == [f"working directory was {here} and is {os.getcwd()}"]


def test_a_test_that_leaves_one_fails(request: pytest.FixtureRequest) -> None:
    path = Path(__file__).parents[1] / "conftest.py"
    conftest = request.config.pluginmanager.get_plugin(str(path))
    end = conftest.pytest_runtest_teardown(request.node)
    next(end)
    CUDA.enable_flash_sdp(False)
    try:
        with pytest.raises(pytest.fail.Exception, match="flash attention was True and is False"):
            next(end)
    finally:
        CUDA.enable_flash_sdp(True)
