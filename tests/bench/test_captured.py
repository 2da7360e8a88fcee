# SPDX-License-Identifier: Apache-2.0
"""bench/captured.py: the transformer learns, and what it chose is what the file holds."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch

import captured
import recall_sources
import video_transformer
import vsa
from video_transformer import places, rotate, subgrids, turns_of
from vsa.measure import patterns

CPU = torch.device("cpu")


def clip(*grid: int) -> torch.Tensor:
    return torch.randn(*grid, video_transformer.LATENT_CHANNELS)


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    q, k = torch.randn(2, 1, 64)
    scores = [
        rotate(q, turns_of(at + there)) @ rotate(k, turns_of(at)).T
        for at in torch.tensor([[[0.0, 0, 0]], [[9.0, 4, 31]]])
        for there in torch.tensor([[3.0, 1, 2], [0.0, 0, 0]])
    ]
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[1], q @ k.T, rtol=1e-4, atol=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_examples_hold_the_tokens_of_their_positions() -> None:
    latent = clip(4, 9, 20)
    examples = subgrids([latent], (2, 3, 4), torch.Generator().manual_seed(0))
    reached = 0
    for _, (chosen, place) in zip(range(50), examples, strict=False):
        t, h, w = place.long().unbind(1)
        assert chosen.shape == (1, 24, 64) and torch.equal(chosen[0], latent[t, h, w])
        reached = max(reached, int(w.max() - w.min()))
    assert reached > 14  # not only neighbours


def test_a_few_steps_lower_the_loss_and_the_seed_decides_them() -> None:
    losses, again = [], []
    latents = [clip(4, 4, 4).mul(0.1) + 1]
    for heard in (losses, again):
        video_transformer.train(latents, 12, (2, 4, 4), 3, CPU, heard.append)
    assert losses == again and sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_queries_are_those_of_the_layers_last_first() -> None:
    model, latent = video_transformer.VideoTransformer(), clip(2, 4, 4)
    done = []
    q, k = captured.queries_and_keys(model, latent, 0, lambda: done.append(1))
    assert q.shape == k.shape == (1, 32, captured.MOST_HEADS, 64) and len(done) == 4
    seen = {}
    last = model.blocks[-1].attention
    last.register_forward_pre_hook(lambda layer, given: seen.update(x=given))
    captured.queries_and_keys(model, latent, 0, lambda: None)
    expected, _, _ = last.queries_keys_values(*seen["x"])
    assert torch.equal(q[:, :, :4], expected.transpose(1, 2))


def test_sampled_recall_is_recall_where_every_tile_is_sampled() -> None:
    grid = vsa.Grid((4, 8, 10))
    q, k = torch.randn(2, 1, grid.tokens, 3, 64)
    selection = vsa.select(q, k, 2, grid=grid)
    sizes = grid.tile_sizes()
    assert grid.num_tiles <= captured.SAMPLED_TILES and sizes.min() < 64
    found = captured.sampled_recall(selection, q, k)
    per_token = selection.recall(q, k)[0]
    torch.testing.assert_close(found, per_token, rtol=0.1, atol=0.02)
    everything = vsa.Selection.from_mask(torch.ones(1, 3, 6, 6, dtype=torch.bool), grid)
    torch.testing.assert_close(captured.sampled_recall(everything, q, k), torch.ones(3))


def test_positions_are_in_raster_order() -> None:
    assert places((1, 2, 2), CPU).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_the_command_trains_draws_and_writes_patterns(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    file, pictures = tmp_path / "captured.pt", tmp_path / "pictures"
    options = ["--out", file, "--steps", 2, "--cpu", "--layers", "4x8x8:2", "--topk", 0.5]
    recording = tmp_path / "recording.pt"
    done = forked.run(captured.__file__, *options, "--pictures", pictures, "--recording", recording)
    assert done.returncode == 0, done.stderr
    source = recall_sources.open_source(recording, CPU, 2, 0, None)
    assert source.grid == vsa.Grid((4, 8, 8)) and source.about["calibration_clips"] == 6
    clip = next(iter(source.held_out))
    assert list(clip) == [f"layers.{n}" for n in range(4)]
    assert {x.q.shape for x in clip.values()} == {(1, 256, 4, 64)}
    found = patterns.captured(file, vsa.Grid((4, 8, 8)), 2, 2)
    assert found.density == 0.5 and len(list(pictures.glob("*.png"))) == 3
    assert "4x8x8, 2 heads" in done.stdout and "2 steps; loss" in done.stdout


def test_more_heads_than_the_model_has_are_refused(tmp_path: Path) -> None:
    options = "--out", tmp_path / "x.pt", "--layers", "4x8x8:17"
    done = forked.run(captured.__file__, *options)
    assert done.returncode == 2 and "16 heads at most" in done.stderr
