# SPDX-License-Identifier: Apache-2.0
"""The installed package is the one under test, and every test starts from the same seed."""

from __future__ import annotations

import functools
import gc
import importlib.resources
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from kernels.facts_library import Facts
from process_state import changes, process_state

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the clone itself on the path, where the compiled part is missing.
if not any((ROOT / "vsa").glob("_C*.so")):
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]

torch.set_num_threads(1)

# A machine that is slow, or busy with other work, fails no test.
hypothesis.settings.register_profile("patient", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("patient")

ONE_WORKER = (
    "emulator/test_emulator.py",
    "emulator/test_products8.py",
    "kernels/test_sass.py",
    "mutants/test_backward_kernels.py",
    "mutants/test_clean_text.py",
    "mutants/test_float_product.py",
    "mutants/test_forward_kernel.py",
    "mutants/test_low_precision_forward.py",
    "mutants/test_padded_tiles.py",
    "mutants/test_quantise_tiles.py",
    "mutants/test_sub_blocks.py",
    "mutants/test_tail_kernels.py",
    "mutants/test_tile_scheduler.py",
    "mutants/test_work_list.py",
    "python/test_attention.py",
)
"""Files whose tests share what takes long to compile or compute: one worker runs all of a file."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine-code",
        type=Path,
        metavar="FOLDER",
        help="cubins that the build of the package kept, with what nvcc said: .ci/run makes it",
    )


@functools.cache
def _forks(file: str) -> bool:
    text = (ROOT / file).read_text()
    return re.search(r"^(import forked|from distributed import ranks)", text, re.M) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How `-n` shares out tests, where no other way is asked for: one by one, but for those.

    And one worker runs all that fork from a process with large imports, so that there is one such.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if _forks(file):
                return "forked"
            return file if file.endswith(ONE_WORKER) else nodeid

    return ByWhatIsShared(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Half a million objects of imported libraries stay: a collection need not walk them each time.

    And tracing allocates so much that the default threshold has it interrupted all the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000)


def _hopper() -> bool:
    from vsa.backends import BACKENDS, Request

    return torch.cuda.is_available() and BACKENDS["hopper"].why_not(Request("cuda")) is None


@pytest.fixture(params=["emulated", "hopper"])
def machine(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Where the project's own kernels run: backend and device, the emulator and a Hopper GPU."""
    if request.param == "emulated":
        return "emulated", "cpu"
    if not _hopper():
        pytest.skip("needs a Hopper GPU")
    return "hopper", "cuda"


@pytest.fixture
def same_bits() -> Iterator[None]:
    """Gradients have the same bits every time, for tests that compare them bit by bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


_FOUND = pytest.StashKey[dict[str, object]]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Before all fixtures of a test."""
    item.stash[_FOUND] = process_state()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """After all of them: a test that leaves another process to later ones fails itself."""
    yield
    if left := changes(item.stash[_FOUND]):
        pytest.fail(f"the test has changed the process that others run in: {'; '.join(left)}")


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """What one test compiles does not count towards the next one's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
        # Times the guards of each graph for the log, after it has emptied all caches of the CPU:
        # 50 ms, a fifth of what a small graph takes.
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    # Not torch.manual_seed: it prints a stack for each kind of device that is not there, for every
    # call, and keeps them all.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def toolchain():
    """third_party/cuda_toolchain.py: the compilers that the build itself would take."""
    spec = importlib.util.spec_from_file_location(
        "vsa_test_toolchain", ROOT / "third_party" / "cuda_toolchain.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="session")
def compiler(toolchain):
    found = toolchain.find_compiler()
    if found.tool is None:
        record = importlib.resources.files("vsa") / "_build.json"
        built = json.loads(record.read_text()) if record.is_file() else {"compiled": True}
        if not built["compiled"]:
            pytest.skip(f"vsa was built without its compiled part: {built['why']}")
        pytest.fail(f"no C++20 compiler was found: {'; '.join(found.rejected)}")
    return found.tool


MachineCode = Callable[..., tuple[list[Path], str]]


@pytest.fixture(scope="session")
def machine_code(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MachineCode:
    """Cubins of files of csrc/launch, and all that nvcc and ptxas said of them.

    Those that the build of the package has kept, where pytest is told of them; else nvcc compiles
    each file, once.
    """
    kept: Path | None = request.config.getoption("--machine-code")
    if kept is not None:
        return lambda *sources: (
            [kept / f"{Path(source).stem}.cubin" for source in sources],
            "".join((kept / f"{source}.txt").read_text() for source in sources),
        )
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc on this machine")
    import sass

    folder = tmp_path_factory.mktemp("cubins")
    return lambda *sources: sass.compile_kernels(nvcc, folder, sources)


@pytest.fixture(scope="session")
def facts(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """csrc/prim/facts.h, compiled for this session."""
    return Facts(compiler, tmp_path_factory.mktemp("facts"))
