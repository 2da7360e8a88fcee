# SPDX-License-Identifier: Apache-2.0
"""Several runs together, on made-up curves whose law is known: nothing here was measured."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from vsa.cli import app
from vsa.cli.train import compare
from vsa.cli.train.fits import fit, frontier
from vsa.measure.provenance import HEAD

Loss = Callable[[float], float]
FLOPS = {"10m": 1e15, "25m": 4e15, "60m": 1.6e16}
"""Of an evaluation's steps."""


def plain(flops: float) -> float:
    return 30.0 * flops**-0.12


def offset(flops: float) -> float:
    return 0.08 + 4e6 * flops**-0.5


def run(
    losses: dict[str, Loss],
    size: str = "10m",
    seed: int = 0,
    evaluations: int = 12,
    cost: dict[str, float] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A file of ``vsa train``: each kind's loss is a function of its FLOPs."""
    rows = []
    for number in range(evaluations + 1):
        for kind, loss in losses.items():
            flops = number * FLOPS[size] * (cost or {}).get(kind, 1.0)
            held_out = loss(flops) if number else 1.6
            clips = [held_out + 0.01 * n for n in (-1, 0, 1)]
            rows.append(
                {"kind": kind, "step": 250 * number, "flops": flops, "train_ms": 1e3 * number}
                | {"held_out": held_out, "held_out_clips": clips}
            )
    recipe = dict.fromkeys(compare.RECIPE, 1) | {"grid": [16, 32, 32], "warmup": 100, "topk": 0.125}
    about = {"kinds": list(losses), "size": size, "seed": seed, "rows": rows}
    return {**dict.fromkeys(HEAD, "made up"), **recipe, **about, **changes}


def cells(table: Table) -> dict[str, list[str]]:
    """Its rows by their first cell."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: list(map(str, row[1:])) for row in zip(*columns, strict=True)}


def written(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as said:
        console.print(table)
    return said.get()


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_laws_are_found_again(noise: float) -> None:
    drawn = random.Random(0)
    for law, floor, power in ((plain, 0.0, 0.12), (offset, 0.08, 0.5)):
        points = [
            (flops, law(flops) * math.exp(noise * drawn.gauss(0, 1)))
            for flops in (1e15 * 1.5**n for n in range(14))
        ]
        found = fit(points)
        assert found is not None and found.points == 14
        assert found.power == pytest.approx(power, rel=1e-6 if not noise else 0.1)
        assert found.floor == pytest.approx(floor, abs=1e-7 if not noise else 0.01)
        assert found.error == pytest.approx(noise, abs=0.6 * noise + 1e-7)
        assert found.loss(3e15) == pytest.approx(law(3e15), rel=1e-6 + 2 * noise)
        assert found.flops_for(law(3e15)) == pytest.approx(3e15, rel=1e-5 + 40 * noise)


def test_few_points_get_no_floor_and_fewer_no_law() -> None:
    points = [(flops, offset(flops)) for flops in (1e15, 4e15, 1.6e16, 6.4e16, 2.5e17)]
    for count in (3, 5):
        found = fit(points[:count])
        assert found is not None and found.floor == 0.0 and found.points == count
        assert found.error > 0.001  # it does not fit, and says so
    assert fit(points[:2]) is None and fit([points[0]] * 3) is None
    six = fit([*points, (1e18, offset(1e18))])
    assert six is not None and six.floor == pytest.approx(0.08, abs=1e-6)


def test_a_law_says_nothing_outside_its_points() -> None:
    found = fit([(flops, offset(flops)) for flops in (1e15 * 2**n for n in range(8))])
    assert found is not None
    assert found.flops == pytest.approx((1e15, 128e15))
    assert found.flops_for(0.079) is None and found.flops_for(offset(1e14)) is None
    assert found.flops_for(offset(1e15)) == pytest.approx(1e15)
    assert found.flops_for(offset(128e15)) == pytest.approx(128e15)
    assert re.fullmatch(r"0\.0800 \+ 0\.0\d+ \(FLOPs / 1e\+17\)\^-0\.500", str(found))


def test_the_frontier_is_what_nothing_beats() -> None:
    points = [(4.0, 0.5), (1.0, 0.9), (2.0, 0.95), (3.0, 0.5), (5.0, 0.4), (6.0, 0.45)]
    assert frontier(points) == [(1.0, 0.9), (3.0, 0.5), (5.0, 0.4)]


def test_a_law_goes_through_the_frontier_of_all_sizes() -> None:
    # A size stops learning at a loss of its own; only what is above it follows the law.
    floors = {"10m": plain(4e15), "25m": plain(1.6e16), "60m": 0.0}
    runs = [
        run({"full": lambda flops, low=floors[size]: max(plain(flops), low)}, size)
        for size in FLOPS
    ]
    (group,) = compare.groups(runs)
    assert group.sizes == list(FLOPS)
    law = compare.laws(group)["full"]
    assert law is not None and law.power == pytest.approx(0.12) and law.floor == 0
    assert law.flops == pytest.approx((1e15, 12 * 1.6e16))
    (table,) = compare.tables(runs)
    assert "3" in cells(table)["full"][0] and "frontier of all sizes" in written(table)


def test_the_ratio_of_flops_at_equal_loss() -> None:
    # vsa learns as full does in as many steps, each of which costs 2.53 times less.
    cost = {"vsa": 1 / 2.53}
    kinds = {"full": plain, "vsa": lambda flops: plain(2.53 * flops)}
    runs = [run(kinds, size, cost=cost) for size in FLOPS]
    tables = list(compare.tables(runs))
    assert len(tables) == 4  # an order for each size, and the laws
    ratios = re.findall(r"([\d.]+)x at", cells(tables[-1])["vsa"][-1])
    assert ratios == ["2.53", "2.53"]
    saved = cells(tables[0])["vsa"][-1]
    assert saved == "2.53x"
    assert cells(tables[0])["vsa"][3].startswith("+0.0000 ± 0.0000")


def test_one_size_is_no_scaling_law() -> None:
    (table,) = compare.tables([run({"full": plain})])
    assert "says nothing about larger models" in written(table)


def test_seeds_are_put_together_and_kinds_ordered_by_pairs() -> None:
    runs = []
    for seed, shift in ((0, 0.0), (1, 0.05), (2, 0.02)):
        kinds: dict[str, Loss] = {
            "full": lambda flops, more=shift: plain(flops) + more,
            "vsa": lambda flops, more=shift: plain(flops) + more - 0.01,
            "window": lambda flops, more=shift: plain(flops) + more + 0.06 + more / 10,
        }
        runs.append(run(kinds, seed=seed, evaluations=12 - seed))
    # Of a kind of one seed: its loss is low because its seed is easy.
    runs.append(run({"random": lambda flops: plain(flops) + 0.02}, seed=0))
    order, _ = compare.tables(runs)
    found = cells(order)
    assert list(found) == ["vsa", "full", "random", "window"]
    assert found["full"][0] == "0, 1, 2" and found["random"][0] == "0"
    assert "loss at step 2,500" in written(order)  # the last that all were evaluated at
    at = plain(10 * FLOPS["10m"])
    assert found["full"][1] == f"{at + 0.07 / 3:.4f}"
    assert found["full"][2] == f"({at:.4f} to {at + 0.05:.4f})"
    assert found["vsa"][3] == "-0.0100 (-0.0100 to -0.0100)"
    assert found["random"][3] == "+0.0200 ± 0.0000"
    assert found["window"][3] == "+0.0623 (+0.0600 to +0.0650)"
    verdicts = [found[kind][4] for kind in ("vsa", "full", "random", "window")]
    assert verdicts == ["within 0.0500", "", "within 0.0500", "beyond 0.0500"]


def test_runs_of_other_recipes_and_lengths_are_not_mixed() -> None:
    runs = [run({"full": plain}), run({"vsa": plain}, topk=0.25), run({"vsa": plain}, seed=1)]
    assert [len(group.curves) for group in compare.groups(runs)] == [2, 1]
    long, short = run({"full": plain}, evaluations=12), run({"full": plain}, evaluations=4)
    (group,) = compare.groups([short, long])
    assert group.of("full", "10m")[0].rows[-1]["step"] == 3000
    apart = run({"vsa": plain})
    for row in apart["rows"]:
        row["step"] += 1 if row["step"] else 0
    order, _ = compare.tables([long, apart])
    assert "no step at which all" in str(order.caption) and not order.rows
    assert compare.groups([run({"full": plain}, evaluations=0)]) == []
    with pytest.raises(KeyError):
        compare.groups([{"rows": []}])


def test_evaluations_during_warmup_are_left_out_of_a_law() -> None:
    (group,) = compare.groups([run({"full": plain}, warmup=600)])
    assert len(compare.kind_frontier(group, "full")) == 10


def test_the_command_prints_and_draws_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kinds = {"full": plain, "vsa": offset}
    files: list[str] = []
    for number, size in enumerate(FLOPS):
        content = run(kinds, size) | {"batch": 1, "real": 0.25, "topk": 0.125}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        files += ["--read", str(path)]
    picture = tmp_path / "fit.png"
    result = CliRunner(env={"COLUMNS": "250", "TERM": "dumb"}).invoke(
        app, ["train", *files, "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    assert "Loss over FLOPs, 16x32x32 tokens: 10m, 25m, 60m" in result.output
    assert "60m, 16x32x32 tokens: kinds by loss" in result.output
    assert picture.stat().st_size > 10_000
