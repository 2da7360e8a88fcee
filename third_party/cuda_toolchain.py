# SPDX-License-Identifier: Apache-2.0
"""Finds what the build compiles with: a C++20 compiler, and nvcc if there is one that works.

"Works" is tried, not guessed: each candidate compiles a few lines the way the build will.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A complete CUDA 13 compiler as wheels (earlier CUDA wheels lack nvcc itself). 13.0 and not newer:
# drivers as old as 580 accept its runtime without minor-version compatibility.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",  # nvcc, ptxas, fatbinary
    "nvidia-cuda-crt==13.0.88",  # headers that nvcc includes by itself
    "nvidia-nvvm==13.0.88",  # cicc, its device compiler
    "nvidia-cuda-runtime==13.0.96",  # cuda_runtime.h, libcudart_static
    "nvidia-cuda-cccl==13.0.85",  # libcu++, which the runtime's headers use
)
OLDEST_NVCC = (12, 3)  # what other Hopper attention kernels ask for; 13.0 is what is tested here
MEASURED_NVCC = (13, 0)  # whose machine code bench/ times; every release schedules it anew

CXX_PROBE = "#include <Python.h>\n#include <concepts>\nstatic_assert(std::integral<int>);\n"
CUDA_PROBE = "#include <concepts>\n__global__ void probe() {}\nstatic_assert(std::integral<int>);\n"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that compiled and linked for sm_90a."""

    nvcc: Path
    version: tuple[int, int]
    origin: str  # "CUDA_HOME", "CUDA_PATH", "PATH" or "wheels"

    def environment(self) -> dict[str, str]:
        """Environment that nvcc must run in."""
        return nvcc_environment(self.nvcc)


@dataclass(frozen=True)
class Found:
    """What a search found, and why each candidate before it was turned down."""

    tool: Toolkit | Path | None
    rejected: tuple[str, ...]


def is_measured(version: tuple[int, int]) -> bool:
    """Whether the kernels were timed as this release of nvcc compiles them."""
    return version == MEASURED_NVCC


def cuda_switch() -> str:
    """VSA_CUDA: "auto" (default), "0" or "1"."""
    value = os.environ.get("VSA_CUDA") or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"vsa: VSA_CUDA must be auto, 0 or 1, got {value!r}.")
    return value


@functools.cache
def find_compiler() -> Found:
    """The C++20 compiler: $CXX if set, else the first of c++, g++, clang++ that works."""
    rejected = []
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        program = shutil.which(name)
        problem = "not found" if program is None else _cxx_problem(program)
        if problem is None:
            return Found(Path(program), tuple(rejected))
        rejected.append(f"{name}: {problem}")
    return Found(None, tuple(rejected))


@functools.cache
def find_toolkit(compiler: Path) -> Found:
    """The first nvcc that works with `compiler`: $CUDA_HOME, $CUDA_PATH, PATH, then the wheels."""
    rejected = []
    for origin, nvcc in _candidates():
        version = _version(nvcc)
        if version is None:
            problem = "is not a program that answers --version as nvcc does"
        elif version < OLDEST_NVCC:
            problem = "is CUDA {}.{}, older than {}.{}".format(*version, *OLDEST_NVCC)
        else:
            problem = _cuda_problem(nvcc, compiler)
        if problem is None:
            return Found(Toolkit(nvcc, version, origin), tuple(rejected))
        rejected.append(f"{nvcc} (from {origin}) {problem}")
    return Found(None, tuple(rejected))


def wheels_to_build_with() -> list[str]:
    """Build requirements that bring nvcc, where a build wants it and the machine has none."""
    wheels_exist = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if cuda_switch() == "0" or not wheels_exist:
        return []
    compiler = find_compiler().tool
    if compiler is None or find_toolkit(compiler).tool is not None:
        return []
    return list(NVCC_WHEELS)


def nvcc_environment(nvcc: Path) -> dict[str, str]:
    """os.environ, with the folder of the CUDA libraries where nvcc would not look by itself."""
    environment = dict(os.environ)
    root = nvcc.parent.parent
    if (root / "lib").is_dir() and not (root / "lib64").exists():  # so in the wheels
        known = environment.get("LIBRARY_PATH")
        environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(root / "lib"), known]))
    return environment


def _candidates() -> Iterator[tuple[str, Path]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield variable, Path(root) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield "PATH", _behind(Path(found))
    spec = importlib.util.find_spec("nvidia")
    # Build requirements may be spread over several folders, each with its own part of `nvidia`.
    for part in (spec.submodule_search_locations or ()) if spec else ():
        if (nvcc := Path(part) / "cu13" / "bin" / "nvcc").exists():
            yield "wheels", nvcc


def _behind(nvcc: Path) -> Path:
    """The nvcc that lies in a toolkit, given one on PATH that may be a link or a wrapper to it."""
    # A link called nvcc that leads to another name is a compiler cache: nvcc only by its own name.
    if nvcc.resolve().name == "nvcc":
        nvcc = nvcc.resolve()
    told = _run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    if told and (top := re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)):
        inside = Path(top[1].strip()) / "bin" / "nvcc"
        if inside.exists():
            return inside.resolve()
    return nvcc


def _version(nvcc: Path) -> tuple[int, int] | None:
    told = _run(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", told.stdout) if told else None
    return (int(found[1]), int(found[2])) if found else None


def _cxx_problem(program: str) -> str | None:
    include = sysconfig.get_path("include")
    return _compile_problem(
        [program, "-std=c++20", "-fPIC", "-shared", f"-I{include}"], "probe.cpp", CXX_PROBE
    )


def _cuda_problem(nvcc: Path, compiler: Path) -> str | None:
    flags = ["-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC"]
    command = [str(nvcc), *flags, f"-ccbin={compiler}"]
    return _compile_problem(command, "probe.cu", CUDA_PROBE, nvcc_environment(nvcc))


def _compile_problem(
    command: list[str], name: str, source: str, environment: dict[str, str] | None = None
) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(source)
        done = _run(*command, name, "-o", "probe.so", cwd=folder, env=environment)
        if done is None:
            return "cannot be run"
        if done.returncode != 0:
            said = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
            return "fails to compile a probe: " + (said or ["no error was printed"])[0].strip()
    return None


def _run(*command: object, **options: object) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, **options
        )
    except OSError:
        return None
