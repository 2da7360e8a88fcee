# SPDX-License-Identifier: Apache-2.0
"""csrc/prim and csrc/tile: kernels on the emulator, mutants by their names, CuTe, and nvcc."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from pathlib import Path

import pytest
from child_process import output, run

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "tests" / "cpp"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{CPP}"]
SEEDS = 9  # three habits of copies times three of the scheduler

# What each mutant in tests/cpp/mutants.h must be reported as. Where one has several effects, the
# schedule decides which comes first. WRONG NUMBERS: nothing but the result tells.
MUTANTS = {
    "NoFullWait": "RACE",
    "NoEmptyWait": "RACE|TOO MANY ARRIVALS",
    "EarlyRelease": "RACE",
    "NoProductWait": "FRAGMENT IN FLIGHT",
    "WaitTooShallow": "WGMMA STILL IN FLIGHT",
    "NoProxyFence": "MISSING PROXY FENCE",
    "NoTailFence": "MISSING PROXY FENCE",
    "NoNamedBarrier": "MISSING NAMED BARRIER",
    "NoWgmmaFence": "MISSING WGMMA FENCE",
    "WrongPhase": "PHASE ALIAS",
    "ExpectsTooMuch": "WRONG EXPECT_TX",
    "ExpectsTooLittle": "WRONG EXPECT_TX",
    "ExpectsNothing": "RACE|WRONG EXPECT_TX",
    "PlainMap": "WRONG SWIZZLE",
    "PlainStores": "WRONG SWIZZLE",
    "WrongStride": r"WRONG DESCRIPTOR: .* read of q\[\d\]: .* not 512",
    "WrongLeading": r"WRONG DESCRIPTOR: .* read of v\[\d\]: .* not 4096",
    "WrongStep": r"WRONG DESCRIPTOR: .* read of q\[\d\]: it starts at row 1,",
    "NoTranspose": r"WRONG DESCRIPTOR: .* read of v\[\d\]: it starts at row 16,",
    "LostArrive": r"DEADLOCK: .*producer waits for kv_empty\[1\] use 0",
    "DoubleRelease": "PHASE ALIAS|TOO MANY ARRIVALS|RACE",
    "StoreBufferReused": r"RACE: .*TMA load into q\[\d\].* not ordered after .*TMA store from q",
    "StoreNotAwaited": "RACE|STORES STILL IN FLIGHT",
    "DivergedRelease": "DIVERGED",
    "ReleasedUnseen": "RACE|PHASE ALIAS|TOO MANY ARRIVALS",
    "OperandReused": "FRAGMENT IN FLIGHT",
    "NotElected": "NOT ELECTED",
    "LoadsTooMany": "LOADS STILL IN FLIGHT",
    "StagingReused": "MISSING NAMED BARRIER",
    "StagingNotAwaited": "RACE",
    "StoreNotCommitted": "STORES NEVER COMMITTED",
    "BarrierNotInitialised": "MBARRIER NOT INITIALISED",
    "LonelyMeeting": r"DEADLOCK: .*named barrier 1 \(128 of 256 threads are there\)",
    "CrookedMap": "BAD TENSOR MAP",
    "LoadBeforeTheTensor": "BAD COPY: .* TMA load's box begins out of bounds",
    "StoreBeforeTheTensor": "BAD COPY: .* TMA store's box begins at a negative coordinate",
    "TileNotLabelled": "WRONG DESCRIPTOR: .* no labelled tile",
    "LoneRelease": r"MISSING NAMED BARRIER .*wgmma read of q\[\d\].* TMA load into q",
    "NoTailZeros": r"NEVER WRITTEN: .* read of q\[\d\]",
    "NoMask": "WRONG NUMBERS",
}

elements = pytest.mark.parametrize("element", ["bf16", "fp16"])
channels = pytest.mark.parametrize("channels", ["64", "128"])


@pytest.fixture(scope="session")
def toolkit(toolchain, compiler):
    found = toolchain.find_toolkit(compiler)
    if found.tool is None:
        pytest.skip(f"no nvcc was found: {'; '.join(found.rejected) or 'none on this machine'}")
    return found.tool


@pytest.fixture(scope="session")
def emulator(compiler, tmp_path_factory):
    """Runs one command of tests/cpp/emulator.cpp; returns its answer."""
    program = tmp_path_factory.mktemp("emulator") / "emulator"
    flags = ["-std=c++20", "-Og", "-Wall", "-Wextra", "-Werror", "-pthread"]
    output(compiler, *flags, *INCLUDES, CPP / "emulator.cpp", "-o", program)
    return lambda *words: output(program, *words)


def test_16_bit_numbers_round_as_on_the_gpu(emulator):
    assert emulator("numbers") == "0"


@elements
@channels
@pytest.mark.parametrize("seed", range(SEEDS))
def test_attention_agrees_with_fp64(emulator, element, channels, seed):
    answer = emulator("run", element, channels, seed)
    assert re.fullmatch(r"error \d+\.\d+", answer), answer
    assert float(answer.split()[1]) <= 1  # what rounding P and O to 16 bits explains


@elements
@channels
def test_products_of_a_backward_pass_are_exact(emulator, element, channels):
    for seed in range(SEEDS):
        assert emulator("products", element, channels, seed) == "0"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_reported_by_name(emulator, mutant):
    report = emulator("mutant", mutant, SEEDS)
    assert re.match(rf"seed \d: ({MUTANTS[mutant]})", report), report


def test_unchanged_kernel_is_not_reported(emulator):
    assert emulator("mutant", "None", 2 * SEEDS) == "nothing"


def test_two_machines_run_in_two_threads(emulator):
    assert emulator("threads") == "same"


def test_operand_facts_agree_with_cute(compiler, toolkit, tmp_path):
    cutlass = importlib.util.find_spec("cutlass_library")
    if cutlass is None:
        pytest.skip("CuTe is not installed: pip install --no-deps nvidia-cutlass==4.2.0.0")
    headers = Path(cutlass.submodule_search_locations[0]) / "source" / "include"
    cuda = toolkit.nvcc.parent.parent / "include"
    oracle = tmp_path / "oracle"
    foreign = [word for path in (headers, cuda, cuda / "cccl") for word in ("-isystem", path)]
    output(
        compiler,
        "-std=c++20",
        "-O1",
        "-w",
        *INCLUDES,
        *foreign,
        CPP / "cute_oracle.cpp",
        "-o",
        oracle,
    )
    counts = dict(line.split(": ") for line in output(oracle).splitlines() if "ERROR" not in line)
    assert len(counts) == 19
    assert set(counts.values()) == {"0"}, counts


def test_kernels_compile_for_the_gpu_without_spills_or_serialised_products(
    toolkit, compiler, tmp_path
):
    command = [toolkit.nvcc, f"-ccbin={compiler}", "-std=c++20", "-Xptxas=-v", "-cubin"]
    target = "-gencode=arch=compute_90a,code=sm_90a"
    cubin = tmp_path / "kernels.cubin"
    done = run([*command, target, *INCLUDES, CPP / "kernels.cu", "-o", cubin])
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert report.count("Compiling entry function") == 11
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 11
    assert "C75" not in report, report  # ptxas: products serialised, or waits put between them
    assert "warning" not in report, report
