# SPDX-License-Identifier: Apache-2.0
"""bench/work_tile_clocks.py: its marks in the kernels of today, its files, its rows and tables.

That the program compiles, with the marks, is in test_programs.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import vsa
import work_tile_clocks as bench
from results_table import section
from tables_clocks import work_tile_clocks as tables
from vsa.measure import patterns
from vsa.measure.provenance import HEAD, read
from work_tile_marks import CONSUMER, CSRC, LAUNCH, MARKS, PARTS, SCHEDULER, marked

CASE = bench.Case("random", (4, 6, 9), 2, 64, 2)
# Consumers with random lists at 32x32x32, 12 heads, d 128, as an H200 gave their means
# (bench/log/work-tile-ends.md). Made up: all of the scheduler.
WORK_TILES, BLOCKS = 6156, 132
FOUND = [[round(22469.3 * 3 * BLOCKS), 3 * BLOCKS], [round(2564.4 * WORK_TILES), 5760]]
FOUND += [[round(mean * WORK_TILES), WORK_TILES] for mean in (846.8, 143206.5, 3237.5)]
FOUND += [[clocks * BLOCKS, 0] for clocks in (1001, 1002, 1003, 1004, 1005, 1006, 1007)]
LINE = {"ms": 1.6437, "consumers": 3, "parts": FOUND + [[0, 0]] * 4}


def text_of(header: str) -> str:
    return (CSRC / header).read_text()


def named() -> list[str]:
    return [part for mark in MARKS for part in re.findall(r'mark\("([^"]+)"\)', mark.becomes)]


def test_what_marks_quote_is_in_the_kernels_and_stays_there() -> None:
    for header in {mark.header for mark in MARKS}:
        marked(header, text_of(header))
    for mark in MARKS:
        words = iter(re.findall(r"\w+|\S", mark.becomes))
        assert all(word in words for word in re.findall(r"\w+|\S", mark.quote)), mark.quote


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.quote[:24])
def test_a_kernel_that_has_changed_is_named_with_the_quote(mark) -> None:
    text = text_of(mark.header)
    quoted = re.search(r"\s+".join(map(re.escape, mark.quote.split())), text)
    with pytest.raises(SystemExit) as said:
        marked(mark.header, text.replace(quoted[0], ""))
    assert f"csrc/{mark.header} to have this once, but it has it 0 times" in str(said.value)
    assert str(said.value).endswith(mark.quote)
    with pytest.raises(SystemExit, match="it has it 2 times"):
        marked(mark.header, text + quoted[0])


def test_every_part_ends_at_one_mark_but_for_the_launch() -> None:
    assert sorted(named()) == sorted(set(PARTS) - {LAUNCH})


def test_the_program_has_room_for_all_parts() -> None:
    source = bench.SOURCE.read_text()
    assert int(re.search(r"kMostParts = (\d+)", source)[1]) == len(LINE["parts"]) >= len(PARTS)
    assert int(re.search(r"kParts = (\d+)", source)[1]) == len((LAUNCH, *CONSUMER))


def test_means_are_of_consumers_of_work_tiles_and_of_blocks() -> None:
    clocks = bench.mean_clocks(3, LINE["parts"])
    consumer = [22469.3, 2564.4, 846.8, 143206.5, 3237.5]
    assert [clocks[part] for part in (LAUNCH, *CONSUMER)] == pytest.approx(consumer, abs=0.1)
    assert [clocks[part] for part in SCHEDULER] == [1001, 1002, 1003, 1004, 1005, 1006, 1007]


def test_tables_of_a_recorded_line() -> None:
    row = CASE._asdict() | {"grid": [32, 32, 32], "heads": 12, "head_dim": 128, "topk": 64}
    row |= {"unmarked_ms": [1.617, 1.6358], "marked_ms": [1.6437], "tflops": 510.0, "consumers": 3}
    first, consumers, second, scheduler = tables(
        [row | {"clocks": bench.mean_clocks(3, LINE["parts"])}]
    )
    assert "consumer" in first and "scheduler" in second
    lists = "| random, 32x32x32, 12 heads, d 128, 64"
    line = (
        f"{lists} | 1.6170, 1.6358 | 1.6437 | 510 | 22,469 | 2,564 | 847 | 143,206 | 3,238 | 746 |"
    )
    assert consumers.splitlines()[2] == line
    line = f"{lists} | 1,001 | 1,002 | 1,003 | 1,004 | 1,005 | 1,006 | 1,007 | 7,028 |"
    assert scheduler.splitlines()[2] == line
    heads = consumers.splitlines()[0] + scheduler.splitlines()[0]
    assert all(f"| {part} |" in heads for part in PARTS)


def on_a_cpu(program: Path, case: bench.Case, folder: Path) -> bench.Row:
    """What the program does, with the files that it is given."""
    grid = vsa.Grid(case.extent)
    shape = 1, grid.length, case.heads, case.head_dim
    q, k, v = (bench.get(folder / name, torch.bfloat16, *shape) for name in "qkv")
    axes = bench.get(folder / "axes", torch.int32, case.heads)
    assert set(axes.tolist()) <= {0, 1, 2, 3}
    words = bench.get(folder / "bitmap", torch.int32, 1, case.heads, grid.num_tiles, -1)
    lists = vsa.Selection(words, grid.num_tiles, grid, grid)
    assert lists.mask().sum(-1).unique().tolist() == [case.topk]
    out, lse = vsa.block_sparse_attention(q, k, v, lists, return_lse=True, backend="torch")
    bench.put(folder / "out", out * FACTORS[program.name])
    bench.put(folder / "lse", lse)
    return LINE | {"ms": 2.0 if program.name == "program" else 1.0}


FACTORS: dict[str, float] = {}


def row_of(monkeypatch: pytest.MonkeyPatch, with_marks: float, without: float) -> bench.Row:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    monkeypatch.setattr(bench, "run", on_a_cpu)
    for name, factor in (("program", with_marks), ("program-unmarked", without)):
        monkeypatch.setitem(FACTORS, name, factor)
    return bench.measured(CASE, Path("program"), None, torch.device("cpu"))


def test_files_and_the_row_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(monkeypatch, 1, 1)
    assert row["unmarked_ms"] == [1, 1] and row["marked_ms"] == [2, 2]
    assert set(row["parts"]) == set(row["clocks"]) == set(PARTS)
    pairs = row["tflops"] * 1e9 / 4 / 64  # of tokens, in a millisecond
    mask = patterns.selection("random", vsa.Grid((4, 6, 9)), 2, 2, torch.device("cpu")).mask()[0]
    sizes = [64, 64, 16, 32, 32, 8]  # of 1 x 2 x 3 tiles
    expected = sum(sizes[i] * sizes[j] for _, i, j in mask.nonzero().tolist())
    assert pairs == pytest.approx(expected)
    assert row["errors"]["out"] < 0.01 and len(list(tables([row]))) == 4


@pytest.mark.parametrize(
    ("with_marks", "without", "expected"),
    [(1, -1, "with marks and without differ"), (1.5, 1.5, "wrong results, so not timed: out")],
)
def test_wrong_outputs_have_no_row(monkeypatch, with_marks, without, expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        row_of(monkeypatch, with_marks, without)


def test_a_program_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$2 $3 $4 $5 $6: no GPU" >&2\nexit 1\n')
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="program failed: 64 2 4 6 9: no GPU"):
        bench.run(program, CASE, tmp_path)
    program.write_text(f"#!/bin/sh\necho '{json.dumps(LINE)}'\n")
    assert bench.run(program, CASE, tmp_path) == LINE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--patterns captured", "--captured FILE"),
        ("--patterns columns", "invalid choice: 'columns'"),
        ("--layers 32x32", "written as 32x32x32:12"),
        ("--head-dims 96", "invalid choice: 96"),
        ("--topk 2", "--topk as a float is a share of the key tiles"),
        ("--binary nowhere", "there is no nowhere"),
        ("--binary here --build there", "not allowed with argument"),
    ],
)
def test_bad_options_end_with_a_sentence(monkeypatch, capsys, options: str, expected: str) -> None:
    monkeypatch.setattr(sys, "argv", ["work_tile_clocks.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


def test_captured_lists_that_cannot_be_read_end_with_a_sentence(tmp_path: Path) -> None:
    for file in (tmp_path / "none.pt", Path(__file__)):
        case = CASE._replace(pattern="captured")
        with pytest.raises(SystemExit, match=rf"work_tile_clocks.py: error: .*{file.name}"):
            bench.measured(case, Path("program"), file, torch.device("cpu"))


def test_a_run_writes_its_rows(monkeypatch, tmp_path: Path, capsys) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    monkeypatch.setattr(bench, "run", on_a_cpu)
    for name in ("program", "program-unmarked"):
        monkeypatch.setitem(FACTORS, name, 1.0)
    words = "--binary program --layers 4x6x9:2 --head-dims 64 --topk 0.3 --patterns random"
    file = tmp_path / "clocks.json"
    options = bench.parser().parse_args([*words.split(), "--commit", "abc", "--out", str(file)])
    bench.measure(options, bench.cases(options), torch.device("cpu"))
    found = read(file)
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert found["command"].startswith("bench/work_tile_clocks.py")
    assert [row["topk"] for row in found["rows"]] == [2]
    assert "random, 4x6x9, 2 heads, d 64, 2" in capsys.readouterr().out
    assert "random, 4x6x9, 2 heads, d 64, 2" in section(file)
