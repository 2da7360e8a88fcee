# SPDX-License-Identifier: Apache-2.0
"""The backward at head_dim 128 whose consumers make dQ, as mutants: each has its name."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, Planted
from mutants.mutants_of_query_halves import IN_ONE_PASS_CONSUMER, IN_PLACES, IN_QUERY_HALVES

PROGRAM = ROOT / "tests" / "cpp" / "one_pass.cpp"
SEEDS = 9  # the schedules of test_emulator.py

HEADERS = (
    "kernels/schedule/tile_schedule.h",
    "kernels/schedule/resident_tiles.h",
    "kernels/schedule/tile_scheduler.h",
    "kernels/schedule/rings.h",
    "kernels/fine/query_sums.h",
    "kernels/fine/query_halves.h",
    "kernels/fine/one_pass_consumer.h",
    "kernels/fine/backward_keys_config.h",
    "kernels/fine/backward_keys.h",
)
PROBLEMS = ("one_pass", "uneven_one_pass")
MUTANTS = {
    "kernels/fine/query_halves.h": {PROBLEMS[:1]: IN_QUERY_HALVES},
    "kernels/fine/one_pass_consumer.h": {PROBLEMS[:1]: IN_ONE_PASS_CONSUMER},
    "kernels/schedule/tile_scheduler.h": {PROBLEMS: IN_PLACES},
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_pass")
    includes = "launch/fine_params.h"
    return Planted(compiler, PROGRAM, folder, HEADERS, MUTANTS, PROBLEMS, SEEDS, includes)


@pytest.mark.parametrize("header", MUTANTS)
def test_mutants_are_reported_by_name(planted, header):
    assert not planted.unnoticed(header)


def test_unchanged_kernels_are_not_reported(planted):
    for problem in PROBLEMS:
        assert planted.unchanged(problem, 2 * SEEDS) == "nothing"
