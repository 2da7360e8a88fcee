# SPDX-License-Identifier: Apache-2.0
"""bench/precision.py: what it measures is what attention and a model do, and it runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from training.small import settings

import precision
import precision_measures
import recall_sources
import vsa
from precision_measures import CHOSEN, DENSE, EXACT, SPARSITY
from recall_sources import Layer, open_source
from vsa.measure.provenance import HEAD
from vsa.training import checkpoints
from vsa.training.run import Run

CPU = torch.device("cpu")
GRID = vsa.Grid((4, 8, 8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of two kinds after two steps."""
    folder = tmp_path_factory.mktemp("weights")
    run = Run(settings(), CPU)
    run.train(2, None)
    checkpoints.save_weights(run, folder)
    return folder


def test_errors_are_those_of_each_head_over_the_same_tiles() -> None:
    q, k, v = torch.randn(3, 2, GRID.tokens, 3, 64).bfloat16().unbind()
    found = precision_measures._errors(Layer(q, k, v), GRID, 0.5, "torch")
    selection = vsa.select(q, k, 0.5, grid=GRID)
    exact, lse = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, return_lse=True
    )
    dense = vsa.attention(q.double(), k.double(), v.double(), 1.0, grid=GRID)
    for name in ("native", "int8", "fp8"):
        out, own = vsa.block_sparse_attention(q, k, v, selection, precision=name, return_lse=True)
        off = out.double() - exact
        error = (off.square().sum((0, 1, 3)) / exact.square().sum((0, 1, 3))).sqrt()
        torch.testing.assert_close(found[name].error, error)
        assert (found[name].worst >= found[name].error).all()
        torch.testing.assert_close(found[name].lse, (own - lse).abs().amax((0, 2)))
    off = (exact - dense).square().sum((0, 1, 3)) / dense.square().sum((0, 1, 3))
    torch.testing.assert_close(found[SPARSITY].error, off.sqrt(), rtol=1e-4, atol=0)
    assert found["native"].error.max() < 0.005 < found["int8"].error.min()
    assert found["int8"].error.mean() < found["fp8"].error.mean()


@pytest.mark.parametrize("kind", ["vsa", "full"])
def test_a_model_runs_in_every_way(weights: Path, kind: str) -> None:
    source = open_source(weights / f"weights-{kind}.pt", CPU, 4, 1, None)
    trained = source.trained
    assert trained is not None
    loops = precision_measures.of_model(trained, 0.5, 3, 1.0, "torch")
    assert list(loops) == [EXACT, DENSE, "native", "int8", "fp8", CHOSEN]
    assert loops["int8"].precision == ("int8", "int8") and loops[CHOSEN].precision == ("fp8", "fp8")
    torch.testing.assert_close(loops[CHOSEN].videos, loops["fp8"].videos, rtol=0, atol=0)
    native = loops["native"]
    assert native.videos.shape == (3, 4, GRID.tokens, 48) and native.loss.shape == (4,)
    away = {
        name: precision_measures.difference(loop.videos, native.videos)[-1].item()
        for name, loop in loops.items()
    }
    assert away["native"] == 0 and all(away[name] > 0 for name in (EXACT, DENSE, "int8", "fp8"))
    model = trained.sparse()
    assert model is not None
    model.set_topk(0.5)
    with torch.no_grad():
        exact = trained.loss(model)  # fp32 on a CPU
    torch.testing.assert_close(loops[EXACT].loss, exact)
    assert not torch.equal(native.loss, loops["int8"].loss)
    assert (native.loss - loops["int8"].loss).abs().max() < 0.05


def test_a_loop_takes_eulers_steps(weights: Path) -> None:
    trained = open_source(weights / "weights-full.pt", CPU, 4, 1, None).trained
    assert trained is not None
    times: list[float] = []

    def straight(video: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        times.append(time[0].item())
        return target - 1.0

    straight.grid = trained.model.grid  # type: ignore[attr-defined]
    noise = torch.Generator().manual_seed(0)
    target = torch.randn(2, GRID.tokens, 48, generator=noise)
    found = precision_measures.denoised(trained, straight, 4)
    assert times[:4] == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(found[-1, :2], torch.ones(2, GRID.tokens, 48), rtol=0, atol=1e-5)


def test_kinds_without_a_choice_have_no_loop(weights: Path) -> None:
    run = Run(settings(kinds=("coarse",)), CPU)
    checkpoints.save_weights(run, weights)
    trained = open_source(weights / "weights-coarse.pt", CPU, 2, 1, None).trained
    assert trained is not None
    assert precision_measures.of_model(trained, 0.5, 2, 0.05, "torch") == {}


def test_the_command_measures_weights_and_recordings(weights: Path, tmp_path: Path) -> None:
    recording, out, plot = (tmp_path / name for name in ("rec.pt", "out.json", "out.png"))
    source = open_source(weights / "weights-vsa.pt", CPU, 2, 2, None)
    recall_sources.record(recording, source)
    files = [str(weights / "weights-vsa.pt"), str(recording)]
    options = ["--cpu", "--clips", "2", "--steps", "2", "--topk", "0.5", "--plot", str(plot)]
    done = forked.run(Path(precision.__file__), *files, "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found)[: len(HEAD)] == list(HEAD) and found["complete"]
    assert [x["name"] for x in found["sources"]] == ["vsa tiny", "rec"]
    rows: list[dict[str, Any]] = found["rows"]
    layers = [row for row in rows if row["what"] == "layer"]
    assert len(layers) == 2 * 2 * 4 and all(row["worst_tile"] >= row["error"] for row in layers)
    models = {row["precision"]: row for row in rows if row["what"] == "model"}
    assert list(models) == [EXACT, DENSE, "native", "int8", "fp8", CHOSEN]
    assert all(row["source"] == "vsa tiny" for row in models.values())
    assert len(models["fp8"]["to_native_by_step"]) == 2 and models["native"]["to_native"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words in ("errors of heads", "the whole model, 2 steps", "chosen, with at most 0.05"):
        assert words in done.stdout


def test_it_refuses_what_it_cannot_measure(weights: Path, tmp_path: Path) -> None:
    q = torch.randn(1, GRID.tokens, 1, 32)
    clip = {"layer": dict.fromkeys("qkv", q)}
    content = {"about": {}, "grid": list(GRID.shape), "tile": [4, 4, 4], "clips": [clip, clip]}
    torch.save(content, tmp_path / "narrow.pt")
    narrow, good = str(tmp_path / "narrow.pt"), str(weights / "weights-vsa.pt")
    out = ["--out", str(tmp_path / "out.json"), "--cpu"]
    for arguments, sentence in (
        ([narrow, *out], "has a head_dim of 32, but low precision takes 64 or 128"),
        ([good, "--out", "/nowhere/x.json"], "must be in a folder that exists"),
        ([good, *out, "--at-most", "0"], "--at-most must be a number in (0, 1]"),
        ([good, *out, "--steps", "0"], "--steps must be at least 1"),
        ([good, *out, "--backend", "flex"], "invalid choice: 'flex'"),
    ):
        done = forked.run(Path(precision.__file__), *arguments)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
