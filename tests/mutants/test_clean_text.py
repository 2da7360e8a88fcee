# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/fine/clean_text.h by itself: every bit right, and mutants by their names."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "clean_text.cpp"
HEADER = "kernels/fine/clean_text.h"
SEEDS = 40
ROWS, COPY = "WRONG ROWS", "WRONG COPY"

MUTANTS: MutantTable = {
    "MaskUnasked": ("load_global(valid + batch * batch_stride", "1 + 0 * (batch_stride", ROWS),
    "MaskOfTheFirstElement": ("valid + batch * batch_stride", "valid", ROWS),
    "MaskWithoutStrides": ("text * token_stride)", "text)", ROWS),
    "NoMaskIsNoText": ("valid == nullptr ||", "valid != nullptr &&", ROWS),
    "BitsReversed": ("1u << i", "128u >> i", ROWS),
    "BitsPastTheEnd": ("token < size && p.is_real", "p.is_real", ROWS),
    "EndOfThePrefix": ("in_suffix ? p.suffix : p.prefix", "p.prefix", ROWS),
    "SuffixMaskedAsPrefix": ("in_suffix ? p.prefix : 0", "0", ROWS),
    "SuffixCountsOn": ("(in_suffix ? of_prefix * kBytesOfRows : 0)", "0", ROWS),
    "SuffixBeginsEarly": ("byte >= of_prefix * kBytesOfRows", "byte >= of_prefix", ROWS),
    "RowsOfTheFirstElement": (
        "const int batch = static_cast<int>(lane / (tiles * kBytesOfRows));",
        "const int batch = 0;",
        ROWS,
    ),
    "InvalidTextCopied": ("p.is_real(batch, at) ? x", "true ? x", COPY),
    "SuffixAsItLies": ("x.suffix_begin + at - p.prefix", "x.suffix_begin + at", COPY),
    "TextInARow": ("at < p.prefix ? at :", "true ? at :", COPY),
    "PrefixTooLong": ("at < p.prefix ? at :", "at <= p.prefix ? at :", COPY),
    "ChannelsOfTheFirstChunk": ("in_batch % chunks * kChunkElements", "0", COPY),
    "HeadsReversed": ("head = row % x.heads", "head = x.heads - 1 - row % x.heads", COPY),
    "CopiesOfTheFirstElement": (
        "const int batch = static_cast<int>(lane / per_batch);",
        "const int batch = 0;",
        COPY,
    ),
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder, tables = tmp_path_factory.mktemp("clean_text"), {HEADER: {("text",): MUTANTS}}
    includes = "kernels/fine/gates.h"
    return Planted(compiler, PROGRAM, folder, (HEADER,), tables, ("text",), SEEDS, includes)


def test_every_bit_is_right(planted):
    assert planted.unchanged("text", 10 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(planted):
    assert not planted.unnoticed(HEADER)
