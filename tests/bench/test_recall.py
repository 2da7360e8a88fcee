# SPDX-License-Identifier: Apache-2.0
"""bench/recall.py: what it measures is what attention does, and its command runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from training.small import settings

import recall
import recall_measures
import recall_sources
import vsa
from recall_measures import Way, dense_attention, selection
from recall_sources import Layer, open_source
from vsa.measure.provenance import HEAD
from vsa.training import checkpoints
from vsa.training.run import Run

CPU = torch.device("cpu")
GRID = vsa.Grid((3, 5, 8), tile=(2, 4, 4))


def layer(gates: bool = False) -> Layer:
    q, k, v = torch.randn(3, 2, GRID.tokens, 4, 16).unbind()
    both = torch.randn(2, 2, GRID.tokens, 4, 16).unbind() if gates else (None, None)
    return Layer(3 * q, k[:, :, :2], v[:, :, :2], *both)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of two kinds after two steps."""
    folder = tmp_path_factory.mktemp("weights")
    run = Run(settings(), CPU)
    run.train(2, None)
    checkpoints.save_weights(run, folder)
    return folder


def test_dense_attention_is_dense_attention() -> None:
    x = layer()
    mass, out = dense_attention(x, GRID)
    q, k, v = (each.double().transpose(1, 2) for each in (x.q, x.k, x.v))
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    chosen = vsa.select(x.q, x.k, 3, grid=GRID)
    kept = (mass * chosen.mask()).sum(-1)  # the mean over tiles of several sizes
    recall_of_tokens = chosen.recall(x.q, x.k, backend="torch")
    by_token = kept[:, :, GRID.tile_of_token()].mean(-1)
    torch.testing.assert_close(by_token.float(), recall_of_tokens, rtol=1e-4, atol=1e-5)


def test_the_oracle_keeps_the_most_and_budgets_are_kept() -> None:
    x = layer()
    mass, _ = dense_attention(x, GRID)
    budget = vsa.LayerBudget((1, 2, 3, GRID.num_tiles), GRID.num_tiles)
    best, mean = (selection(x, GRID, budget, score, mass) for score in ("oracle", "mean"))
    for chosen in (best, mean):
        counts = chosen.mask().sum(-1)
        assert (counts == torch.tensor(budget.counts)[:, None]).all()
    kept = [(mass * chosen.mask()).sum(-1) for chosen in (best, mean)]
    assert (kept[0] >= kept[1] - 1e-12).all() and (kept[0] > kept[1]).any()
    torch.testing.assert_close(kept[0][:, 1], mass[:, 1].topk(2).values.sum(-1))


@pytest.mark.parametrize("gates", [False, True])
def test_errors_are_those_of_the_output(gates: bool) -> None:
    x = layer(gates)
    two, all8 = ({"calibrated": vsa.LayerBudget((n,) * 4, 8)} for n in (2, 8))
    budgets = {("mean", 0.3): two}
    found = dict(recall_measures._ways(x, GRID, budgets))
    tails = recall_measures.tails()
    assert len(found) == 2 * len(tails) * (1 + gates)
    doubles = [None if y is None else y.double() for y in (x.gate_coarse, x.gate_fine)]
    outs = [
        vsa.attention(
            *(y.double() for y in (x.q, x.k, x.v)),
            topk,
            grid=GRID,
            gate_coarse=doubles[0],
            gate_fine=doubles[1],
        )
        for topk in (2, 1.0)
    ]
    norms = [y.square().sum((1, 3)).sqrt() for y in (outs[0] - outs[1], outs[1])]
    _, error = found[Way("mean", "uniform", 0.3, False, gates)]
    assert GRID.num_tiles == 8 and error.min() > 0.05  # 30 % of 8 tiles, rounded up, are 3
    wide = dict(recall_measures._ways(x, GRID, {("mean", 0.25): two}))
    _, error = wide[Way("mean", "uniform", 0.25, False, gates)]
    torch.testing.assert_close(error, (norms[0] / norms[1]).mean(0), rtol=1e-4, atol=1e-6)
    again = wide[Way("mean", "calibrated", 0.25, False, gates)]
    torch.testing.assert_close(error, again[1])  # two tiles as well
    everything = {(score, 1.0): all8 for score in ("mean", "oracle")}
    for kept, off in dict(recall_measures._ways(x, GRID, everything)).values():
        torch.testing.assert_close(kept, torch.ones(4, dtype=torch.float64))
        assert off.max() < 1e-5


def test_what_a_model_attends_with_is_captured(weights: Path) -> None:
    source = open_source(weights / "weights-vsa.pt", CPU, 2, 2, None)
    clip = next(iter(source.held_out))
    model, _ = checkpoints.load_model(weights / "weights-vsa.pt")
    assert source.trained is not None
    batch = source.trained.held_out[0]
    told = {}

    def keep(_: object, given: tuple[torch.Tensor]) -> None:
        told["out"] = given[0]

    model.layers[1].attention.to_out.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.lerp(batch.video, batch.noise, batch.time[:, None, None]), batch.time)
    x = clip["blocks.1.attention"]
    out = vsa.attention(
        x.q, x.k, x.v, 2, grid=source.grid, gate_coarse=x.gate_coarse, gate_fine=x.gate_fine
    )
    torch.testing.assert_close(out.flatten(2), told["out"], rtol=1e-4, atol=1e-5)
    assert list(clip) == ["blocks.0.attention", "blocks.1.attention"]


def test_clips_are_captured_in_16_bits_and_measured_without(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        recall_sources.Trained, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16)
    )
    source = open_source(weights / "weights-vsa.pt", CPU, 4, 2, None)
    for clip in source.held_out:
        assert not torch.is_autocast_enabled("cpu")
        x = clip["blocks.0.attention"]
        assert {x.q.dtype, x.k.dtype, x.v.dtype} == {torch.bfloat16}


def test_calibration_and_held_out_clips_differ(weights: Path) -> None:
    source = open_source(weights / "weights-full.pt", CPU, 4, 3, None)
    parts = [
        [x["blocks.0.attention"].q for x in part] for part in (source.calibration, source.held_out)
    ]
    assert [len(part) for part in parts] == [2, 2]  # batches of two clips
    assert source.about["clips"] == 4 and source.about["calibration_clips"] == 4
    assert not any(torch.equal(a, b) for a in parts[0] for b in parts[1])


def test_losses_are_those_of_the_model(weights: Path) -> None:
    for kind in ("vsa", "full"):
        source = open_source(weights / f"weights-{kind}.pt", CPU, 4, 2, None)
        trained = source.trained
        assert trained is not None
        budgets = recall_measures.calibrated(source, [0.5, 1.0], 8, lambda: None)
        found, whole = recall_measures.losses(source, budgets, lambda: None)
        assert len(whole["trained"]) == 4 and whole["trained"].unique().numel() == 4
        gates = kind == "vsa"
        half, every = (found[Way("mean", "uniform", x, False, gates)] for x in (0.5, 1.0))
        # vsa was trained with half of its tiles, full with all
        torch.testing.assert_close(whole["trained"], half if gates else every)
        torch.testing.assert_close(whole["every tile"], every)
        assert not torch.equal(half, every)
        own = found[Way("mean", "calibrated", 0.5, False, gates)]
        model = trained.sparse()
        assert model is not None
        budgets["mean", 0.5]["calibrated"].apply_to(model)
        torch.testing.assert_close(own, trained.loss(model))
    assert not any(way.score == "oracle" for way in found)


def test_fixed_tiles_have_no_loss_by_other_choices(tmp_path: Path) -> None:
    run = Run(settings(kinds=("window",)), CPU)
    checkpoints.save_weights(run, tmp_path)
    source = open_source(tmp_path / "weights-window.pt", CPU, 2, 2, None)
    budgets = recall_measures.calibrated(source, [0.5], 8, lambda: None)
    assert recall_measures.losses(source, budgets, lambda: None) == ({}, {})
    assert recall_measures.measured(source, budgets, lambda: None)


def test_the_command_measures_draws_and_records(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot, kept = (tmp_path / name for name in ("recall.json", "recall.png", "kept.pt"))
    few = "--clips", 2, "--calibrate", 2, "--topk", 0.25, 0.5, "--cpu"
    both = weights / "weights-vsa.pt", weights / "weights-full.pt"
    done = forked.run(
        recall.__file__, *both, "--out", out, "--plot", plot, "--budgets", tmp_path / "b", *few
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert found["command"].startswith("bench/recall.py ")
    assert [source["name"] for source in found["sources"]] == ["vsa tiny", "full tiny"]
    scores, tails = len(recall_measures.SCORES), len(recall_measures.tails())
    heads = 1 + len(recall_measures.AIMS)
    ways = scores * 2 * heads * tails
    assert len(found["rows"]) == 2 * ways + ways  # vsa has gates, full has none
    for row in found["rows"]:
        assert 0 < row["recall_least"] <= row["recall_p5"] <= row["recall"] <= 1
        assert 0 < row["error"] <= row["error_p95"] <= row["error_most"]
        assert ("loss" in row) == (
            row["score"] != "oracle" and row["gates"] == ("vsa" in row["source"])
        )
        if "tiles_by_head" in row:
            each = [count for layer in row["tiles_by_head"] for count in layer]
            assert sum(each) == row["tiles"] * len(each)
    assert plot.read_bytes().startswith(b"\x89PNG") and "vsa tiny: 2 held-out clips" in done.stdout
    budgets = sorted((tmp_path / "b").glob("*.json"))
    assert len(budgets) == 2 * 2 * len(recall_measures.AIMS) * scores
    model, _ = checkpoints.load_model(both[0])
    for aim in recall_measures.AIMS.values():
        kept_budgets = vsa.Budgets.load(tmp_path / "b" / f"vsa-tiny-mean-0.25-{aim}.json")
        assert kept_budgets.aim == aim and kept_budgets.error is not None
        kept_budgets.apply_to(model)
    # and a recording gives the same figures
    done = forked.run(recall.__file__, both[0], "--out", out, "--keep", kept, *few)
    first = json.loads(out.read_text())["rows"]
    again = forked.run(recall.__file__, kept, "--out", out, "--clips", 1, *few[2:])
    assert done.returncode == again.returncode == 0, done.stderr + again.stderr
    for a, b in zip(first, json.loads(out.read_text())["rows"], strict=True):
        assert a["recall"] == pytest.approx(b["recall"]) and a["error"] == pytest.approx(b["error"])
        assert b["source"] == "kept"


def test_the_share_of_the_gap_that_a_score_closes() -> None:
    at = {"topk": 0.1, "heads": "uniform", "tail": False, "gates": False}
    rows = [at | {"score": s, "recall": r} for s, r in (("mean", 0.5), ("x", 0.6), ("oracle", 0.9))]
    assert recall.gap_closed(rows, 0.1, "x") == pytest.approx(0.25)
    assert recall.gap_closed(rows[:2], 0.1, "x") is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--topk", "1.5"], "--topk must be a number in"),
        (["--clips", "0"], "--clips must be at least 1"),
        (["--plot", "nowhere/x.png"], "must be in a folder that exists"),
        ([], "must be a file of vsa train"),
    ],
)
def test_bad_options(options: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("no weights")
    done = forked.run(recall.__file__, tmp_path / "x.pt", "--out", tmp_path / "x.json", *options)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_recording_of_one_clip_is_refused(tmp_path: Path) -> None:
    content = {"about": {}, "grid": [3, 5, 8], "tile": [2, 4, 4], "clips": [{}]}
    torch.save(content, tmp_path / "one.pt")
    with pytest.raises(ValueError, match="must hold two clips at least"):
        recall_sources.open_source(tmp_path / "one.pt", CPU, 1, 1, None)
