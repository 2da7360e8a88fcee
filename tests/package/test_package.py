# SPDX-License-Identifier: Apache-2.0
"""The package as installed, and the tools that build it."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import vsa
from vsa.measure.provenance import provenance

TREE = Path(__file__).resolve().parents[2]
LAYERS = ["prim", "tile", "kernels", "launch", "bind"]  # each may include itself and those before
BUILT_UPON = {
    ("fine", "schedule"),
    ("tail", "fine"),
    ("tail", "schedule"),
    ("coarse", "schedule"),
    ("coarse", "select"),
}
"""Folders of kernels that include another's: a tail goes on where the fine stage ends, the kernels
of keys and values in eight bits, beside those of means, go through text as schedules do, and means
and scores leave out what a rule of the choice forbids."""

FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  *--dryrun*) echo "#$ TOP={top}" >&2 ;;
  *) {compile} ;;
esac
"""


def build_record():
    return json.loads((importlib.resources.files("vsa") / "_build.json").read_text())


def compiled_part():
    if not build_record()["compiled"]:
        pytest.skip(f"vsa was built without its compiled part: {build_record()['why']}")
    from vsa import _C

    return _C


@pytest.fixture
def toolchain(monkeypatch):
    """third_party/cuda_toolchain.py in a fresh module, on a machine that seems to have no nvcc."""
    spec = importlib.util.spec_from_file_location(
        "cuda_toolchain", TREE / "third_party" / "cuda_toolchain.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_toolchain", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "CUDA_PATH", "VSA_CUDA", "CXX", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return module


def fake_toolkit(root, version="13.0", compile="exit 0", top=None):
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.format(version=version, compile=compile, top=top or root))
    nvcc.chmod(0o755)
    return nvcc


def fatbin_entries(binary):
    """(kind, architecture) of each piece of device code: kind 1 is PTX, 2 is machine code."""
    start = binary.find(struct.pack("<I", 0xBA55ED50))
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", binary, start)
        at = start + header
        while at < start + header + size:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", binary, at)
            yield kind, struct.unpack_from("<I", binary, at + 0x1C)[0]
            at += entry_header + entry_size
        start = binary.find(struct.pack("<I", 0xBA55ED50), start + header + size)


def test_version_has_one_source():
    version = importlib.metadata.version("video-sparse-attention")
    assert vsa.__version__ == version
    assert compiled_part().build_info()["version"] == version


def test_compiled_part_needs_neither_gpu_nor_torch():
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('vsa._C', sys.argv[1])\n"
        "c = u.module_from_spec(spec); spec.loader.exec_module(c)\n"
        "count, reason = c.device_count()\n"
        "assert count == 0 and len(reason.split()) > 4, (count, reason)\n"
        "assert c.build_info() and 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, compiled_part().__file__],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )


def test_build_info_tells_what_the_binary_holds(toolchain):
    native = compiled_part()
    info = native.build_info()
    assert info["cuda"] == build_record()["cuda"]
    device_code = set(fatbin_entries(Path(native.__file__).read_bytes()))
    assert device_code == ({(2, 90)} if info["cuda"] else set())
    assert info["architectures"] == (["sm_90a"] if info["cuda"] else [])
    assert (info["cuda_version"] is None) == (not info["cuda"])
    # Which compilers are timed is written down once, in third_party/cuda_toolchain.py.
    measured = "{}.{}".format(*toolchain.MEASURED_NVCC)
    assert not info["cuda"] or build_record()["measured"] == (info["cuda_version"] == measured)


def test_type_checkers_know_what_the_binary_takes():
    native = compiled_part()
    spec = importlib.util.spec_from_file_location("make_stub", TREE / "csrc/bind/make_stub.py")
    make_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_stub)
    committed = (TREE / "vsa" / "_C.pyi").read_text()
    assert make_stub.stub(native) == committed, "run python csrc/bind/make_stub.py"


def test_includes_point_downward():
    sources = [path for path in (TREE / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 50
    for path in sources:
        own = LAYERS.index(path.relative_to(TREE / "csrc").parts[0])
        for included in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            assert (TREE / "csrc" / included).is_file(), f"{path}: name {included} from csrc/"
            layer = LAYERS.index(included.split("/")[0])
            assert layer <= own, f"{path} includes {included}, which lies above it"
            folders = tuple(Path(x).parent.name for x in (path, included))
            if LAYERS[own] == LAYERS[layer] == "kernels" and folders not in BUILT_UPON:
                assert folders[0] == folders[1], f"{path} includes {included} of another kernel"


def test_nvcc_of_cuda_home_is_taken(toolchain, tmp_path, monkeypatch):
    nvcc = fake_toolkit(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = toolchain.find_toolkit(Path("c++"))
    assert found.tool == toolchain.Toolkit(nvcc, (13, 0), "CUDA_HOME")
    assert found.rejected == ()


def test_nvcc_on_path_is_followed_through_its_wrapper(toolchain, tmp_path, monkeypatch):
    real = fake_toolkit(tmp_path / "toolkit")
    wrapper = fake_toolkit(tmp_path / "wrapper", top=tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert toolchain.find_toolkit(Path("c++")).tool == toolchain.Toolkit(real, (13, 0), "PATH")


def test_nvcc_that_does_not_work_is_passed_over_with_the_reason(toolchain, tmp_path, monkeypatch):
    fake_toolkit(tmp_path / "old", version="11.8")
    fake_toolkit(tmp_path / "broken", compile="echo 'error: unsupported GNU version' >&2; exit 1")
    good = fake_toolkit(tmp_path / "good")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "broken"))
    monkeypatch.setenv("PATH", str(good.parent))
    found = toolchain.find_toolkit(Path("c++"))
    assert found.tool.nvcc == good
    assert "CUDA 11.8, older than" in found.rejected[0]
    assert "unsupported GNU version" in found.rejected[1]


def test_nvcc_of_the_wheels_finds_its_libraries(toolchain, tmp_path, monkeypatch):
    nvcc = fake_toolkit(tmp_path / "nvidia" / "cu13")
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir()
    parts = [str(tmp_path / "elsewhere"), str(tmp_path / "nvidia")]
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    spec.submodule_search_locations = parts
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: spec)
    found = toolchain.find_toolkit(Path("c++")).tool
    assert found == toolchain.Toolkit(nvcc, (13, 0), "wheels")
    assert found.environment()["LIBRARY_PATH"] == str(tmp_path / "nvidia" / "cu13" / "lib")


@pytest.mark.parametrize(
    ("switch", "compiler", "nvcc", "wheels"),
    [
        ("auto", True, False, True),
        ("1", True, False, True),
        ("auto", True, True, False),
        ("0", True, False, False),
        ("auto", False, False, False),
    ],
)
def test_wheels_are_required_only_where_they_help(
    toolchain, monkeypatch, switch, compiler, nvcc, wheels
):
    found = {True: Path("tool"), False: None}
    monkeypatch.setenv("VSA_CUDA", switch)
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: toolchain.Found(found[compiler], ()))
    monkeypatch.setattr(toolchain, "find_toolkit", lambda _: toolchain.Found(found[nvcc], ()))
    assert toolchain.wheels_to_build_with() == (list(toolchain.NVCC_WHEELS) if wheels else [])


def test_no_compiler_is_told_with_what_was_tried(toolchain):
    found = toolchain.find_compiler()
    assert found.tool is None
    assert found.rejected == ("c++: not found", "g++: not found", "clang++: not found")


def test_unknown_switch_is_refused(toolchain, monkeypatch):
    monkeypatch.setenv("VSA_CUDA", "yes")
    with pytest.raises(SystemExit, match="VSA_CUDA must be auto, 0 or 1"):
        toolchain.cuda_switch()


def test_figures_name_the_commit_of_the_checkout_or_of_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(vsa, "__file__", str(tmp_path / "vsa" / "__init__.py"))
    assert provenance(torch.device("cpu"))["commit"] is None
    (tmp_path / "vsa").mkdir()
    (tmp_path / "vsa" / "_build.json").write_text('{"commit": "abc+"}')
    assert provenance(torch.device("cpu"))["commit"] == "abc+"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(TREE), "--no-deps", "-w", str(tmp_path)]
    subprocess.run(command, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    outside = {name.split("/")[0] for name in names} - {"vsa", "video_sparse_attention.py"}
    assert [top for top in outside if not top.endswith(".dist-info")] == []
    kinds = {Path(name).suffix for name in names if name.startswith("vsa/")}
    assert kinds <= {".py", ".pyi", ".so", ".json", ".typed"}


def test_the_extra_for_diffusers_brings_what_loads_its_models():
    """Without accelerate from_pretrained refuses models that keep modules in fp32, as Wan does."""
    text = (TREE / "pyproject.toml").read_text()
    extra = re.search(r"^diffusers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    assert '"accelerate;' in extra and '"diffusers>=' in extra


def test_no_integer_sequence_of_an_enum() -> None:
    """The library of GCC 13 refuses one (bits/utility.h), that of version 12 takes it."""
    sources = [*(TREE / "csrc").rglob("*"), *(TREE / "tests" / "cpp").rglob("*")]
    found = {
        path.name: wrong
        for path in sources
        if path.suffix in (".h", ".cpp", ".cu")
        if (wrong := re.findall(r"integer_sequence<(?!int\b)[^>]*>", path.read_text()))
    }
    assert len(sources) > 50 and not found
