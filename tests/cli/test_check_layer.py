# SPDX-License-Identifier: Apache-2.0
"""vsa check --shape: layers of models are held to fp64, and what is wrong is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.measure.provenance import HEAD
from vsa.measure.shapes import GRIDS, ONE_KEY_HEAD, PADDED_TEXT, SHAPES
from vsa.verify import layer as layers
from vsa.verify.layer import Layer

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
CPU = torch.device("cpu")


def run(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["check", "--device", "cpu", *map(str, arguments)])


def test_our_kernels_are_checked_on_small_grids_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    few = "--tiles", 3, "--backend", "emulated"
    result = run("--shape", "ltx-2", "--small", *few, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"] and found["small"]
    assert [(row["head_dim"], row["dtype"]) for row in found["rows"]] == [
        (d, dtype) for d in (64, 128) for dtype in ("bfloat16", "float16")
    ]
    for row in found["rows"]:
        assert row["backend"] == "emulated" and row["grid"] == [4, 4, 4] and not row["failed"]
        assert all(0 < row["multiples"][name] <= 2 for name in ("out", "dq", "dk", "dv"))


def test_text_that_is_padding_and_one_key_head_are_part_of_it() -> None:
    result = run("--shape", "hunyuan-544p", "--small", "--tiles", 4, "--head-dim", 64)
    assert result.exit_code == 0, result.output
    assert "0+64" in result.output and "2/2" in result.output and "d128" not in result.output
    assert "hunyuan-544p" in ONE_KEY_HEAD & PADDED_TEXT


SMALL = Layer(vsa.Grid((4, 5, 6), suffix=8), 2, 1, 64, torch.bfloat16, padded_text=True)


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> layers.Verdict:
    right = layers.block_sparse_attention
    calls = iter(range(9))
    monkeypatch.setattr(
        layers, "block_sparse_attention", lambda *a, **o: spoil(*right(*a, **o), next(calls))
    )
    return layers.check(SMALL, CPU, "torch", 4, gradients=True)


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (lambda out, lse, call: (out * 1.03, lse), {"out", "dq", "dk", "dv"}),
        (lambda out, lse, call: (out, lse + 0.01), {"lse"}),
        (lambda out, lse, call: (out + 1e-4 * call, lse), {"same bits"}),
        (lambda out, lse, call: (out, lse.nan_to_num(neginf=0.0)), {"padding of lse"}),
        (lambda out, lse, call: (out * torch.nan, lse), {"out", "dq", "dk", "dv"}),
    ],
    ids=["output", "log-sum-exp", "bits", "padding", "nan"],
)
def test_what_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, failed: set[str]
) -> None:
    assert not layers.check(SMALL, CPU, "torch", 4, gradients=True).failed
    assert failed <= set(spoiled(monkeypatch, spoil).failed)


def test_a_wrong_layer_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.block_sparse_attention
    monkeypatch.setattr(
        layers, "block_sparse_attention", lambda *a, **o: [1.03 * x for x in right(*a, **o)]
    )
    arguments = "--small", "--tiles", 2, "--head-dim", 64, "--forward-only"
    result = run("--shape", "ltx-2", *arguments)
    assert result.exit_code == 1 and "FAILED: out, lse" in result.output and "0/2" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "sora"], "shape must be one of wan-1.3b-480p, "),
        (["--small"], "--small, --device must stand with --shape"),
        (["--small"], "Invalid value for '--small' / '--device'"),
        (["--shape", "ltx-2", "--backend", "hopper"], "hopper"),
        (["--shape", "ltx-2", "--backend", "flex"], "flex"),
        (["--shape", "ltx-2", "--json", "x.txt"], "a .json file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_options_are_named_before_any_work(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and words in " ".join(result.output.split())


def test_small_grids_have_the_remainders_of_the_large() -> None:
    for grid in GRIDS.values():
        small = layers.small(grid)
        assert small.tokens < grid.tokens / 8 and small.length <= grid.length
        for mine, large in zip(small.shape, grid.shape, strict=True):
            assert mine % 4 == large % 4


def test_sampled_tiles_hold_the_last_the_first_and_clipped_ones() -> None:
    grid = GRIDS["wan-1.3b-480p"]
    tiles = layers.sampled(grid, 24)
    assert len(set(tiles)) == 24 and tiles[0] == grid.num_tiles - 1 and 0 in tiles
    places = [(n // (8 * 13), n // 13 % 8, n % 13) for n in tiles]
    assert grid.tiles == (6, 8, 13)  # 52 is a multiple of 4: nothing is clipped along w
    assert any(t == 5 for t, _, _ in places[2:]) and any(h == 7 for _, h, _ in places[2:])


def test_every_shape_that_is_timed_can_be_checked() -> None:
    assert SHAPES.keys() < GRIDS.keys() and {*ONE_KEY_HEAD, *PADDED_TEXT} < GRIDS.keys()
