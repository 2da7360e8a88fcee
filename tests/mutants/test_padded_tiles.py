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
        "SizesAboveATile": (
            "size > kTileRows ? kTileRows : size;",
            "size;",
            "WRONG (BOX|ROWS|STORE)",
        ),
        "BoxOfAllSlots": ("loaded = real > 0 ? real : 1;", "loaded = kTileRows;", "WRONG BOX"),
        "NothingInBounds": ("real > 0 ? real : 1;", "real;", "WRONG BOX"),
        "BoxOneSlotOff": ("{tile, loaded - 1,", "{tile, loaded,", "WRONG BOX"),
        "BoxOneRowLonger": (
            "kTileRows - loaded}, real",
            "kTileRows - loaded - 1}, real",
            "WRONG BOX",
        ),
        "RowsOneOff": (
            "? ~uint64_t{0} >> at.first.w",
            "? ~uint64_t{0} >> at.first.w / 2",
            "WRONG ROWS",
        ),
        "RowOfATileWithoutTokens": (
            "at.clip == kWhole ? ~uint64_t{0} >> at.first.w : 0;",
            "~uint64_t{0} >> at.first.w;",
            "WRONG ROWS",
        ),
        "TokensBehindTheLast": (" && row + at.first.w < kTileRows ?", " ?", "WRONG TOKEN"),
        "LastTokenLost": (
            "row + at.first.w < kTileRows ?",
            "row + at.first.w < kTileRows - 1 ?",
            "WRONG TOKEN",
        ),
        "TokenOfATileWithoutTokens": ("at.clip == kWhole && row", "row", "WRONG TOKEN"),
        "ReadsElsewhere": (
            "is_padded(at) ? at.first.t * kTileRows :",
            "is_padded(at) ? at.first.t :",
            "WRONG READABLE",
        ),
        "PaddingNotStored": (
            "sizes.known() || TiledSequence::stores_padding(at);",
            "TiledSequence::stores_padding(at);",
            "WRONG STORE: padding stays",
        ),
        "StoredWhereItWasLoaded": (
            "if (is_padded(at)) at.first = {at.first.t, kTileRows - 1, 0};",
            "",
            "WRONG STORE: its box",
        ),
        "StepsOfAVideo": (
            "padded ? 1 : sequence.grid.tile.w",
            "sequence.grid.tile.w",
            "WRONG PLACE",
        ),
        "StepsOfPaddedTiles": ("padded ? 1 : sequence.grid.tile.w", "1", "WRONG PLACE"),
        "SlotsCountAsTiles": ("padded ? 0 : 1}", "1}", "WRONG TILE"),
        "LinesCountAsTiles": (
            "padded ? 0 : sequence.grid.tiles.w",
            "sequence.grid.tiles.w",
            "WRONG TILE",
        ),
        "TilesOfAVideoDoNotCount": ("padded ? 0 : 1}", "0}", "WRONG TILE"),
        "LinesOfAVideoDoNotCount": ("padded ? 0 : sequence.grid.tiles.w", "0", "WRONG TILE"),
        "SlotsNotHeld": (
            "sizes.known() ? at.first :",
            "sizes.known() ? Axes{tile, 0, 0} :",
            "WRONG PLACE",
        ),
        "MeanOfPadding": ("~uint64_t{0} >> (kTileRows - real)", "~uint64_t{0}", "WRONG MEANS"),
        "MeanOfTheLast": ("~uint64_t{0} >> (kTile", "~uint64_t{0} << (kTile", "WRONG MEANS"),
    },
    SCHEDULE: {
        "HeldAsTiles": ("w * sequence.step_tokens()}", "w * tile.w}", "WRONG PLACE"),
        "CountedAsText": ("sequence.number({t, h, w});", "w;", "WRONG TILE"),
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
