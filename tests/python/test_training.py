# SPDX-License-Identifier: Apache-2.0
"""The layer, the sparsity schedule and the count of operations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import vsa
from vsa.verify.parity import worst


def test_a_fresh_layer_with_everything_kept_is_dense_attention() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 4, topk=1.0, kv_heads=2, gates="both").double()
    x = torch.randn(2, 5, 6, 7, 32, dtype=torch.float64)
    q, k, v = (
        layer.to_qkv(x.flatten(1, 3)).unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], dim=1)
    )
    dense = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    dense = layer.to_out(dense.transpose(1, 2).flatten(2)).view_as(x)
    assert worst(layer(x), dense) < 1e-12


def test_every_parameter_learns() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 4, topk=2, gates="both")
    layer(torch.randn(1, 5, 6, 7, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("gates", [None, "coarse", "both"])
def test_gates_appear_under_their_checkpoint_names(gates: str | None) -> None:
    names = dict(vsa.nn.VideoSparseAttention(32, 4, gates=gates).named_parameters())
    assert ("to_gate_compress.weight" in names) == (gates is not None)
    assert ("to_gate_fine.weight" in names) == (gates == "both")
    if gates:
        assert names["to_gate_compress.weight"].abs().max() == 0


def test_layer_takes_flat_tokens_text_rotary_and_selections() -> None:
    grid = vsa.Grid((4, 5, 6), prefix=3)
    layer = vsa.nn.VideoSparseAttention(32, 4, topk=2)
    x = torch.randn(2, grid.length, 32)
    plain = layer(x, grid)
    turned = layer(x, grid, rotary=lambda q, k: (q.flip(-1), k.flip(-1)))
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-5)
    negated = layer(x, grid, rotary=lambda q, k: (-q, k))
    assert (negated - plain).abs().max() > 1e-3
    everything = vsa.Selection.from_mask(
        torch.ones(2, 4, grid.num_tiles, grid.num_tiles).bool(), grid
    )
    assert (layer(x, grid, selection=everything) - plain).abs().max() > 1e-4
    assert plain.shape == x.shape


def test_ramp_never_rises_and_reaches_its_end_exactly() -> None:
    for ramp in (
        vsa.SparsityRamp(),
        vsa.SparsityRamp(0.9, 0.05, 7, 0.1),
        vsa.SparsityRamp(1.0, 1.0, 1, 1.0),
    ):
        values = [ramp(n) for n in range(40 * ramp.every)]
        assert values[0] == ramp.start and values[-1] == ramp.end
        assert all(a >= b for a, b in pairwise(values))
        assert len(set(values[: ramp.every])) == 1
    ramp = vsa.SparsityRamp(start=1.0, end=0.1, every=50, step=0.03)
    assert ramp(49) == 1.0 and ramp(50) == pytest.approx(0.97) and ramp(50 * 30) == 0.1


def test_flops_by_hand() -> None:
    cost = vsa.flops((16, 28, 52), heads=12, head_dim=128, topk=32, backward=False)
    tokens, tiles = 16 * 28 * 52, 364
    assert cost.full == 4 * 12 * 128 * tokens**2
    assert cost.fine == pytest.approx(cost.full * 32 / tiles)
    assert cost.select == 2 * 12 * 128 * tiles**2
    assert cost.sparse == pytest.approx(sum(cost.stages.values()))
    assert cost.ratio == pytest.approx(cost.full / cost.sparse)
    both = vsa.flops((16, 28, 52), heads=12, head_dim=128, topk=32)
    assert both.full == 3.5 * cost.full and both.select == cost.select
    dense = vsa.flops(vsa.Grid((5, 6, 7), prefix=9), heads=1, head_dim=8, topk=1.0)
    assert dense.fine == pytest.approx(dense.full)
