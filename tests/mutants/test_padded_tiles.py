# SPDX-License-Identifier: Apache-2.0
"""Padded tiles by themselves: boxes, rows, loads and means; mutants by their names."""

from __future__ import annotations

import pytest
from mutants.mutant_programs import ROOT, MutantTable, Planted

PROGRAM = ROOT / "tests" / "cpp" / "padded_tiles.cpp"
SEQUENCE, SCHEDULE, MEANS = HEADERS = (
    "kernels/schedule/sequence.h",
    "kernels/schedule/tile_schedule.h",
    "kernels/coarse/tile_means.h",
)
SEEDS = 40
MUTANTS: dict[str, MutantTable] = {
    SEQUENCE: {
        "SizeOfTheFirstTile": ("load_global(of_tiles + tile)", "load_global(of_tiles)", "WRONG"),
        "NegativeSizes": ("size < 0 ? 0 : size >", "size >", "WRONG (BOX|ROWS|PLACE|FLAGS|TILE)"),
        "SizesAboveATile": (
            "size > kTileRows ? kTileRows : size;",
            "size;",
            "WRONG (BOX|ROWS|STORE)",
        ),
        "BoxFromTheFirstSlot": ("sizes.size(tile) - kTileRows}", "0}", "WRONG (BOX|ROWS|STORE)"),
        "BoxOneRowOff": (
            "sizes.size(tile) - kTileRows}",
            "sizes.size(tile) - kTileRows + 1}",
            "WRONG (BOX|ROWS|STORE)",
        ),
        "RowsOneOff": ("rows_from(-at.first.w)", "rows_from(-at.first.w - 1)", "WRONG ROWS"),
        "RowsOfATileWithoutTokens": (
            "row < kTileRows ? ~uint64_t{0} << row : 0;",
            "~uint64_t{0} << row % kTileRows;",
            "WRONG ROWS",
        ),
        "TokensBeforeTheFirst": ("row + at.first.w < 0 ? -1 :", "", "WRONG TOKEN"),
        "FirstTokenLost": ("row + at.first.w < 0 ?", "row + at.first.w <= 0 ?", "WRONG TOKEN"),
        "ReadsBeforeTheTile": ("if (at.first.w < 0) at.first.w = 0;", "", "WRONG READABLE"),
        "RowsNotMoved": ("first.w < 0 ? -first.w : 0;", "0;", "WRONG STORE"),
        "PaddingNotStored": (
            "region != Region::Video || first.w < 0;",
            "region != Region::Video;",
            "WRONG STORE: padding stays",
        ),
        "StoredWhereItWasLoaded": (
            "place.first.w += place.rows_before();",
            "",
            "WRONG STORE: its box",
        ),
        "StepsOfAVideo": ("padded ? -1 : sequence", "padded ? 1 : sequence", "WRONG PLACE"),
        "StepsOfPaddedTiles": ("padded ? -1 : sequence.grid.tile.w", "-1", "WRONG PLACE"),
        "PaddingCountsAsTiles": ("padded ? 0 : 1}", "1}", "WRONG TILE"),
        "TilesOfAVideoDoNotCount": ("padded ? 0 : 1}", "0}", "WRONG TILE"),
        "PaddingNotHeld": (
            "sizes.known() ? Axes{tile, 0, -at.first.w}",
            "sizes.known() ? Axes{tile, 0, 0}",
            "WRONG PLACE",
        ),
        "MeanOfPadding": ("~uint64_t{0} >> (kTileRows - real)", "~uint64_t{0}", "WRONG MEANS"),
        "MeanOfTheLast": ("~uint64_t{0} >> (kTile", "~uint64_t{0} << (kTile", "WRONG MEANS"),
    },
    SCHEDULE: {
        "HeldAsTiles": ("w * sequence.step_tokens()}", "w * tile.w}", "WRONG PLACE"),
        "CountedAsTiles": ("w * sequence.step_tiles();", "w;", "WRONG TILE"),
    },
    MEANS: {
        "DividedByNothing": ("tokens > 0 ? tokens : 1", "tokens", "WRONG MEANS"),
        "DividedByAllSlots": ("tokens > 0 ? tokens : 1", "kTileRows", "WRONG MEANS"),
        "GridsRows": (
            "x.sizes.known() ? x.sizes.first_rows(tile) : x.grid.rows[place.clip]",
            "x.grid.rows[place.clip]",
            "WRONG MEANS",
        ),
    },
}


@pytest.fixture(scope="module")
def planted(compiler, tmp_path_factory):
    tables = {header: {("tiles",): table} for header, table in MUTANTS.items()}
    includes = (
        "kernels/schedule/work_list.h",
        "kernels/select/tile_rule.h",
        "prim/warp.h",
        "tile/ring.h",
    )
    folder = tmp_path_factory.mktemp("padded_tiles")
    return Planted(compiler, PROGRAM, folder, HEADERS, tables, ("tiles",), SEEDS, *includes)


def test_places_rows_loads_and_means(planted):
    assert planted.unchanged("tiles", 10 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(planted):
    assert not {header: found for header in MUTANTS if (found := planted.unnoticed(header))}
