# SPDX-License-Identifier: Apache-2.0
"""What ``topk`` may be besides a number: a mass of the softmax, or a number per head."""

from __future__ import annotations

import pytest
import torch
from kernels.facts_library import Facts

import vsa
from vsa.backends import torch_kept_tiles
from vsa.stages.coarse import tile_means
from vsa.values import budget


def test_weights_are_the_softmax() -> None:
    scores = torch.randn(50, 300) * torch.logspace(-2, 1, 50)[:, None]
    weights = torch_kept_tiles.softmax_weights(scores)
    shares = weights / weights.sum(-1, keepdim=True)
    truth = scores.double().softmax(-1)
    smallest = truth.amax(-1, keepdim=True) * 2**-32
    assert ((shares - truth).abs() <= smallest + truth * 3e-6).all()
    assert (shares - truth).abs().sum(-1).max() < 1e-6
    same = torch_kept_tiles.softmax_weights(scores.double())
    assert ((weights - same).abs() <= 1 + weights * 3e-6).all()


def test_kernels_and_pytorch_have_the_same_weights(facts: Facts) -> None:
    gaps = torch.cat(
        [
            torch.linspace(0, 24, 5000),
            torch.logspace(-30, 38, 1000),
            torch.arange(40) * 0.69314718,
            torch.tensor([22.180708, 22.180711, torch.inf]),
        ]
    )
    scores = torch.stack([torch.zeros_like(gaps), -gaps], dim=1)
    weights = torch_kept_tiles.softmax_weights(scores)
    assert weights[:, 1].tolist() == [facts.softmax_weight(gap) for gap in gaps.tolist()]
    assert (weights[:, 0] == 2**31).all() and weights.min() == 0


@pytest.mark.parametrize("floor", [1, 5, 0.25, 1.0])
@pytest.mark.parametrize("mass", [0.2, 0.9, 1.0])
def test_top_p_keeps_the_fewest_tiles_that_hold_the_mass(mass: float, floor: float) -> None:
    q, k = torch.randn(2, 2, 5, 9, 10, 2, 16, dtype=torch.float64) * 2
    selection = vsa.select(q, k, vsa.TopP(mass, floor))
    assert selection.most is None
    q_means, k_means = tile_means(
        (q.flatten(1, 3), k.flatten(1, 3)), (selection.grid,) * 2, "torch"
    )
    shares = (q_means @ k_means.mT / 4).softmax(-1)
    kept = selection.mask()
    least = budget.resolve(floor, 18, 2).counts[0]
    held, number = (shares * kept).sum(-1), kept.sum(-1)
    smallest = shares.masked_fill(~kept, 2).amin(-1)
    assert (number >= least).all() and (held >= mass - 2e-6).all()
    assert ((number == least) | (held - smallest < mass)).all()
    assert (smallest >= shares.masked_fill(kept, 0).amax(-1)).all()


def test_every_head_has_its_own_budget() -> None:
    q, k = torch.randn(2, 2, 5, 6, 10, 3, 8)
    selection = vsa.select(q, k[..., :1, :], (1, 0.5, 99))
    assert (selection.mask().sum(-1) == torch.tensor([1, 6, 12])[:, None]).all()
    assert selection.most == 12
    each = [vsa.select(q[..., [h], :], k[..., :1, :], n) for h, n in enumerate((1, 6, 12))]
    assert torch.equal(selection.bitmap, torch.cat([one.bitmap for one in each], 1))
    must = torch.zeros(12, 12, dtype=torch.bool)
    must[:, 3] = True
    forced = vsa.select(q, k, (1, 2, 3), must=must)
    assert forced.mask()[..., 3].all() and forced.most is None


@pytest.mark.parametrize("topk", [vsa.TopP(0.6, 2), vsa.TopP(0.9, 0.1), (2, 0.5)], ids=str)
def test_budgets_under_compile(topk: budget.TopK) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 5, 6, 10, 2, 16).unbind())
    gate = torch.randn(1)
    compiled = torch.compile(vsa.attention, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (vsa.attention, compiled):
        out, selection = function(q, k, v, topk, gate_coarse=gate, return_selection=True)
        runs.append([out, selection.bitmap, *torch.autograd.grad(out.sum(), (q, k, v))])
    for eager, found in zip(*runs, strict=True):
        torch.testing.assert_close(found, eager)


def test_a_layer_takes_any_budget() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=vsa.TopP(0.8, 0.25), gates=None)
    x = torch.randn(1, 5, 6, 10, 32)
    by_mass = layer(x)
    layer.topk = (12, 12)
    everything = layer(x)
    layer.topk = 1.0
    assert torch.equal(everything, layer(x)) and not torch.equal(everything, by_mass)
    assert "TopP(mass=0.8, floor=0.25)" in repr(
        vsa.nn.VideoSparseAttention(32, 2, vsa.TopP(0.8, 0.25))
    )
