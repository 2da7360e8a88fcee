# SPDX-License-Identifier: Apache-2.0
"""The tail's kernels as mutants: the emulator reports each by its name."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, Planted
from mutants.mutants_of_tail import (
    IN_CHUNKS,
    IN_FORWARD,
    IN_GATED_FORWARD,
    IN_MEANS,
    IN_QUERIES,
)

PROGRAM = ROOT / "tests" / "cpp" / "tail.cpp"
SEEDS = 18  # the nine schedules of test_emulator.py, with many stages and with few
PROBLEMS = ("forward", "gated", "means", "queries")
CHUNKS = "kernels/tail/chunks.h"
FORWARD = "kernels/tail/forward.h"
MEANS = "kernels/tail/backward_means.h"
QUERIES = "kernels/tail/backward_queries.h"
# By header, in the order in which one is built upon another: its mutants, and the problems that
# each is found in.
MUTANTS = {
    CHUNKS: {("forward", "queries"): IN_CHUNKS},
    FORWARD: {("forward",): IN_FORWARD, ("gated",): IN_GATED_FORWARD},
    MEANS: {("means",): IN_MEANS},
    QUERIES: {("queries",): IN_QUERIES},
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tail")
    includes = "launch/tail_params.h"
    return Planted(compiler, PROGRAM, folder, tuple(MUTANTS), MUTANTS, PROBLEMS, SEEDS, includes)


@pytest.mark.parametrize("header", MUTANTS)
def test_mutants_are_reported_by_name(planted, header):
    assert not planted.unnoticed(header)


def test_unchanged_kernels_are_not_reported(planted):
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
