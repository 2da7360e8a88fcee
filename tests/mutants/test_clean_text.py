# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/fine/clean_text.h by itself: every bit right, and mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, Planted, build

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


def test_every_bit_is_right(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "clean_text", *flags)
    assert program("vsa", "text", 10 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(compiler, tmp_path):
    tables = {HEADER: {("text",): MUTANTS}}
    includes = "kernels/fine/gates.h"
    planted = Planted(compiler, PROGRAM, tmp_path, (HEADER,), tables, ("text",), SEEDS, includes)
    assert not planted.unnoticed(HEADER)
