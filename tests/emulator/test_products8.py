# SPDX-License-Identifier: Apache-2.0
"""8-bit operands of csrc/prim and csrc/tile: products on the emulator, mutants by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from child_process import output

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "tests" / "cpp"

# What each mutant of tests/cpp/products8.h must be reported as.
MUTANTS = {
    "WrongRows": r"WRONG SWIZZLE: .* read of k\[0\]",
    "HalfStep": r"WRONG DESCRIPTOR: .* read of k\[0\]: it starts between two steps",
    "WrongGroup": r"WRONG DESCRIPTOR: .* read of k\[0\]: it starts at row 1 of eight",
    "NoOnes": r"WRONG DESCRIPTOR: .* read of v\[0\]: it ends outside",
    "PlainQueries": r"WRONG SWIZZLE: .* load from q\[0\]",
    "OperandInFlight": "FRAGMENT IN FLIGHT: .* an operand",
    "NoFence": "MISSING WGMMA FENCE",
    "KeysInOrder": "WRONG NUMBERS",
}


@pytest.fixture(scope="session")
def products8(compiler, tmp_path_factory):
    """Runs one command of tests/cpp/products8.cpp; returns its answer."""
    program = tmp_path_factory.mktemp("products8") / "products8"
    flags = ["-std=c++20", "-Og", "-Wall", "-Wextra", "-Werror"]
    output(compiler, *flags, f"-I{ROOT / 'csrc'}", f"-I{CPP}", CPP / "products8.cpp", "-o", program)
    return lambda *words: output(program, *words)


@pytest.mark.parametrize("kind", ["s8", "e4m3", "half"])
@pytest.mark.parametrize("channels", ["64", "128"])
def test_products_are_exact(products8, kind, channels):
    for seed in range(4):
        assert products8("products", kind, channels, seed) == "0"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_reported_by_name(products8, mutant):
    report = products8("mutant", mutant, 3)
    assert re.match(rf"seed \d: ({MUTANTS[mutant]})", report), report


def test_unchanged_kernel_is_not_reported(products8):
    assert products8("mutant", "None", 6) == "nothing"
