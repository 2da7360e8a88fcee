# SPDX-License-Identifier: Apache-2.0
"""csrc/kernels/schedule/work_list.h by itself: work tiles, each once; mutants by their names."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "work_list.cpp"
HEADER = "kernels/schedule/work_list.h"
SEEDS = 60
ITEM, TWICE, MISSING = (
    "WRONG WORK TILE: there is none",
    "WRONG WORK TILE: it comes",
    "WRONG WORK TILE: one is",
)

MUTANTS: MutantTable = {
    "LongOnesOfEachHeadFirst": (
        "size / groups * first_groups;",
        "0;",
        "WRONG ORDER: a long one|WRONG WORK TILE",
    ),
    "OthersCountedFromZero": (
        "first ? index : index - first_size",
        "index",
        f"{ITEM}|{TWICE}|WRONG AXIS",
    ),
    "TextRoundedDown": (
        ": ceil_div(sequence.text_tiles, consumers))",
        ": sequence.text_tiles / consumers)",
        "WRONG ORDER",
    ),
    "LongOnesAreText": (
        "load_global(order.long_ones)",
        "ceil_div(sequence.text_tiles, consumers)",
        "WRONG ORDER",
    ),
    "OrderForgotten": ("if (order != nullptr)", "if (false)", "WRONG ORDER"),
    "OrderOfTheFirst": (
        "order + head * groups + group",
        "order + group",
        f"WRONG ORDER|{TWICE}",
    ),
    "LongOnesForgotten": (
        "const bool first = index < first_size;",
        "const bool first = false;",
        f"{ITEM}|{TWICE}|{MISSING}",
    ),
    "OthersFromTheStart": (
        "(first ? 0 : first_groups)",
        "0",
        f"WRONG ORDER: a long one|{TWICE}",
    ),
    "GroupsAreTiles": ("group * consumers, load", "group, load", f"{ITEM}|{TWICE}"),
    "LastWorkTileLeft": (
        "index < size; index = take()",
        "index < size - 1; index = take()",
        MISSING,
    ),
    "OneTooMany": ("index < size; index = take()", "index <= size; index = take()", ITEM),
    "AxisOfAnother": ("load_global(axes + head)", "load_global(axes + head / 2)", "WRONG AXIS"),
    "HeadsOfTheFirst": ("{head / heads, head % heads,", "{0, head % heads,", f"{TWICE}|WRONG AXIS"),
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    folder, tables = tmp_path_factory.mktemp("work_list"), {HEADER: {("list",): MUTANTS}}
    includes = ("kernels/schedule/sequence.h", "prim/warp.h")
    return Planted(compiler, PROGRAM, folder, (HEADER,), tables, ("list",), SEEDS, *includes)


def test_every_item_comes_once_and_long_ones_first(planted):
    assert planted.unchanged("list", 10 * SEEDS) == "nothing"
    said = planted.unchanged("counter not zero", 1)
    assert said == "seed 0: TILE COUNTER NOT ZERO: the counter is 3, not 0"


def test_mutants_are_reported_by_name(planted):
    assert not planted.unnoticed(HEADER)
