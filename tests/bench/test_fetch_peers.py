# SPDX-License-Identifier: Apache-2.0
"""bench/fetch_peers.py: which files of a wheel are packed, and that only pinned wheels are."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import compile_peers
import fetch_peers
from comparison.worker import KERNELS

FILES = ["xformers/flash_attn_3/_C.so", "xformers/_C.so", "x.dist-info/METADATA"]


def wheel(path: Path, files: list[str] = FILES) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, name)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of 256 MiB takes gigabytes."""
    monkeypatch.setitem(fetch_peers.FILTERS[1], "dict_size", 1 << 20)


def test_archives_hold_what_is_kept_under_the_name_of_the_kernel(tmp_path: Path) -> None:
    first, second = (wheel(tmp_path / f"{name}.whl") for name in ("first", "second"))
    (keep, _) = (each.keep for each in fetch_peers.PEERS["fa3"])
    count = fetch_peers.pack("fa3", [(first, keep), (second, keep)], tmp_path / "fa3.tar.xz")
    with tarfile.open(tmp_path / "fa3.tar.xz") as tar:
        assert tar.getnames() == ["fa3/flash_attn_3.so"] and count == 1
        assert tar.extractfile("fa3/flash_attn_3.so").read() == FILES[0].encode()


def test_a_wheel_of_which_nothing_is_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no file that matches"):
        fetch_peers.pack("fa3", [(wheel(tmp_path / "w.whl"), "nothing")], tmp_path / "fa3.tar.xz")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("nvidia_cutlass_dsl/dsl_packages/cutlass/cute/core.py", True),
        ("nvidia_cutlass_dsl/lib/libcute.so", True),
        ("nvidia_cutlass_dsl/lib/libcute.a", False),
        ("nvidia_cutlass_dsl/dsl_packages/iket/x.py", False),
        ("nvidia_cutlass_dsl/stubs/x.pyi", False),
        ("nvidia_cutlass_dsl_libs_core-4.8.1.dist-info/METADATA", True),
        ("nvidia_cutlass_dsl/lib/", False),
    ],
)
def test_the_compiler_is_kept_without_what_it_does_not_need(name: str, kept: bool) -> None:
    assert bool(re.fullmatch(fetch_peers.DSL, name)) == kept


def test_a_wheel_other_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch) -> None:
    commands = []

    def pip(command, **_):
        commands.append(command)
        wheel(tmp_path / "fastvideo_kernel-0.3.2-cp312-none-any.whl")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch_peers.subprocess, "run", pip)
    (pinned,) = fetch_peers.PEERS["tk_vsa"]
    with pytest.raises(SystemExit, match=f"but {pinned.sha256} is pinned"):
        fetch_peers.download(pinned, tmp_path)
    assert commands[0][-1] == "fastvideo-kernel==0.3.2" and "--no-deps" in commands[0]


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="no network")
    monkeypatch.setattr(fetch_peers.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"did not download .*\nno network"):
        fetch_peers.download(fetch_peers.PEERS["tk_vsa"][0], tmp_path)


def test_kernels_load_archives_that_are_made() -> None:
    wanted = {archive for kernel in KERNELS.values() for archive in kernel.archives}
    sources = {"flashinfer"}  # of what bench/compile_peers.py makes
    assert wanted | sources == {*fetch_peers.PEERS, *compile_peers.MADE}
