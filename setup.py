# SPDX-License-Identifier: Apache-2.0
"""Builds vsa/_C with CMake and ninja. Everything else about the package is in pyproject.toml.

Switches, all for build time, all environment variables:

VSA_CUDA=auto   compile the CUDA part if an nvcc works; else the host part, and say so (default)
VSA_CUDA=1      fail unless the CUDA part can be compiled
VSA_CUDA=0      host part only
VSA_JOBS=N      compile jobs at a time
VSA_LAUNCH=FILE libvsa_launch.a of another Python's build of these sources: only link it
VSA_EMULATED=FOLDER objects of what runs on a CPU, of another build: link them, compile the rest
VSA_KEEP=FOLDER keep the kernels' machine code there, and as FILE.cu.txt what nvcc says of each file
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "third_party"), str(HERE)]
import cuda_toolchain  # noqa: E402

from video_sparse_attention import digest_of_sources  # noqa: E402

GIB_PER_JOB = 4  # what nvcc takes for one file of heavy templates


@dataclass(frozen=True)
class Plan:
    """What this build compiles; `why` is empty when nothing is left out."""

    compiler: Path | None
    toolkit: cuda_toolchain.Toolkit | None
    why: str

    def record(self, package: Path) -> None:
        """Leaves in the package what is asked about the build: by `vsa info`, beside figures."""
        facts = {"compiled": self.compiler is not None, "cuda": self.toolkit is not None}
        if self.toolkit is not None:
            facts["measured"] = cuda_toolchain.is_measured(self.toolkit.version)
        if self.compiler is not None:
            facts["sources"] = digest_of_sources(HERE / "csrc")
        facts["commit"] = commit()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(facts | {"why": self.why}) + "\n")


def commit() -> str | None:
    """Of this checkout, with a plus if files have changed since; None where there is none."""

    def git(*asked: str) -> str:
        command = ["git", "-C", str(HERE), *asked]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != HERE:
            return None  # unpacked below a checkout of something else
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def plan() -> Plan:
    """Decides once per build, and says loudly what will be missing."""
    switch = cuda_toolchain.cuda_switch()
    compiler = cuda_toolchain.find_compiler()
    if compiler.tool is None:
        why = "no C++20 compiler that can build Python extensions was found"
        return _without(switch, why, compiler.rejected, Plan(None, None, why))
    if switch == "0":
        return Plan(compiler.tool, None, "VSA_CUDA=0")
    toolkit = cuda_toolchain.find_toolkit(compiler.tool)
    if toolkit.tool is None:
        why = "no nvcc that works was found"
        return _without(switch, why, toolkit.rejected, Plan(compiler.tool, None, why))
    used, measured = toolkit.tool.version, cuda_toolchain.MEASURED_NVCC
    if not cuda_toolchain.is_measured(used):
        print(
            "  vsa: building with CUDA {}.{}; the kernels were timed as CUDA {}.{} compiles them, "
            "and every release schedules them anew (bench/log/compilers.md)".format(
                *used, *measured
            ),
            file=sys.stderr,
        )
    return Plan(compiler.tool, toolkit.tool, "")


def _without(switch: str, why: str, rejected: tuple[str, ...], otherwise: Plan) -> Plan:
    tried = "".join(f"\n    {reason}" for reason in rejected)
    if switch == "1":
        raise SystemExit(f"vsa: VSA_CUDA=1, but {why}.{tried}")
    built = "PURE PYTHON" if otherwise.compiler is None else "host part only, NO CUDA KERNELS"
    rule = "*" * 78
    print(f"{rule}\n  vsa: building {built}: {why}.{tried}\n{rule}", file=sys.stderr, flush=True)
    return otherwise


class BuildPackage(build_py):
    """Copies the Python files, and leaves a record of what was compiled."""

    def run(self) -> None:
        """Runs first of all build steps, so a build that cannot succeed fails here."""
        package = HERE / "vsa" if self.editable_mode else Path(self.build_lib, "vsa")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # else files deleted since stay in wheels
        plan().record(package)
        super().run()
        if not self.editable_mode:  # what `vsa mend` puts back, under a name that nobody else has
            shutil.copyfile(package / "__init__.py", package / "_kept_init.txt")


class BuildExtension(build_ext):
    """Hands vsa._C to CMake."""

    def run(self) -> None:
        """Also on its own: `python setup.py build_ext --inplace`."""
        if self.inplace:
            plan().record(HERE / "vsa")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds in a folder that is kept, so that a second build is incremental."""
        folder = HERE / "build" / f"cmake-{sys.implementation.cache_tag}"
        toolkit = plan().toolkit
        environment = toolkit.environment() if toolkit else None
        cmake = _program("cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-G", "Ninja", "-S", str(HERE), "-B", str(folder)]
        configure += [f"-D{key}={value}" for key, value in self._definitions().items()]
        # CMake cannot change its programs, and those of an isolated build are gone after it.
        stamp = folder / "configured-with.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != configure:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _run(configure, environment)
        stamp.write_text(json.dumps(configure))
        _run([cmake, "--build", str(folder), "--parallel", str(_jobs())], environment)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / target.name), str(target))

    def _definitions(self) -> dict[str, object]:
        import pybind11  # here: only building needs it, not reading the metadata

        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": _program("ninja", "BIN_DIR"),
            "CMAKE_CXX_COMPILER": plan().compiler,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "VSA_VERSION": self.distribution.get_version(),
            "VSA_CUDA": "OFF",
            "VSA_LAUNCH": os.environ.get("VSA_LAUNCH", ""),
            "VSA_EMULATED": os.environ.get("VSA_EMULATED", ""),
            "VSA_KEEP": os.environ.get("VSA_KEEP", ""),
        }
        if toolkit := plan().toolkit:
            definitions["VSA_CUDA"] = "ON"
            definitions["CMAKE_CUDA_COMPILER"] = toolkit.nvcc
            definitions["CMAKE_CUDA_HOST_COMPILER"] = plan().compiler
        return definitions


def _run(command: list[str], environment: dict[str, str] | None) -> None:
    if (code := subprocess.run(command, env=environment).returncode) != 0:
        raise SystemExit(f"vsa: CMake failed with exit code {code}, see its output above.")


def _program(name: str, folder_in_wheel: str) -> str:
    """CMake or ninja: from the wheel that this Python imports, else the one on PATH."""
    with contextlib.suppress(ImportError):
        folder = getattr(importlib.import_module(name), folder_in_wheel)
        if found := shutil.which(name, path=folder):
            return found
    if found := shutil.which(name):
        return found
    raise SystemExit(f"vsa: {name} was not found: drop --no-build-isolation or install {name}.")


def _jobs() -> int:
    if asked := os.environ.get("VSA_JOBS"):
        return int(asked)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB)))


# Without a compiler there must be no extension: it would make the wheel specific to a platform.
compiles = cuda_toolchain.find_compiler().tool is not None
setup(
    ext_modules=[Extension("vsa._C", [])] if compiles else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildExtension},
)
