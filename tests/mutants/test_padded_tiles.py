# SPDX-License-Identifier: Apache-2.0
"""Padded tiles by themselves: boxes, rows, loads and means; mutants by their names."""

from __future__ import annotations

from mutants.mutant_programs import ROOT, MutantTable, build, in_copies, is_named, write

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


def test_places_rows_loads_and_means(compiler, tmp_path):
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    program = build(compiler, PROGRAM, tmp_path / "padded_tiles", *flags)
    assert program("vsa", 10 * SEEDS) == "nothing"


def test_mutants_are_reported_by_name(compiler, tmp_path):
    found = in_copies(HEADERS, MUTANTS)
    includes = (
        '#include "kernels/schedule/work_list.h"\n#include "kernels/select/tile_rule.h"\n'
        '#include "prim/warp.h"\n#include "tile/ring.h"\n'
    )
    named = [(header, name) for header in MUTANTS for name in MUTANTS[header]]
    places = [(found.namespace(*each), "tiles") for each in named]
    copies = write(tmp_path / "mutants.h", includes + found.code, ["tiles"], places)
    program = build(compiler, PROGRAM, tmp_path / "mutants", "-Og", "-w", "-include", copies)
    assert program(found.common, SEEDS, 0) == "nothing"  # none of its mutants is chosen
    missed = {}
    for header, name in named:
        said = program(*found.words(header, name, SEEDS))
        if not is_named(said, MUTANTS[header][name]):
            missed[name] = said
    assert not missed
