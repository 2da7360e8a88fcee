# SPDX-License-Identifier: Apache-2.0
"""The forward of int8 and fp8: right in all schedules, and each mutant reported by its name."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, Planted
from mutants.mutants_of_low_precision import (
    IN_FORWARD,
    IN_HALVES,
    IN_LONG,
    IN_QUERIES,
    IN_QUERIES_OF_FP8,
    IN_RESIDENT_TILES,
    IN_SOFTMAX,
    IN_TOTAL,
)

PROGRAM = ROOT / "tests" / "cpp" / "low_precision_forward.cpp"
FORWARD = "kernels/fine/low_precision_forward.h"
PARTS = {
    "kernels/fine/low_precision_queries.h": {
        ("forward",): IN_QUERIES,
        ("fp8",): IN_QUERIES_OF_FP8,
    },
    "kernels/fine/low_precision_softmax.h": {("forward",): IN_SOFTMAX, ("fp8",): IN_HALVES},
    "kernels/fine/low_precision_total.h": {("forward",): IN_TOTAL},
    "kernels/schedule/resident_tiles.h": {("forward",): IN_RESIDENT_TILES},
}
INCLUDES = "launch/low_precision_params.h"
PROBLEMS = ("forward", "fp8", "uneven", "gated", "long")
SEEDS = 18


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    tables = {**PARTS, FORWARD: {("forward",): IN_FORWARD, ("long",): IN_LONG}}
    folder = tmp_path_factory.mktemp("low_precision")
    return Planted(compiler, PROGRAM, folder, tuple(tables), tables, PROBLEMS, SEEDS, INCLUDES)


def test_mutants_of_the_kernel_are_reported_by_name(planted):
    assert not planted.unnoticed(FORWARD)


@pytest.mark.parametrize("header", PARTS)
def test_mutants_of_its_parts_are_reported_by_name(planted, header):
    assert not planted.unnoticed(header)


def test_an_unchanged_kernel_is_not_reported(planted):
    for problem in PROBLEMS[:-1]:
        assert planted.unchanged(problem, SEEDS) == "nothing"
    assert planted.unchanged("long", 3) == "nothing"
