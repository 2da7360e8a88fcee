# SPDX-License-Identifier: Apache-2.0
"""A layer's projections as one product: the same numbers, and nobody is passed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vsa
import vsa.nn
from vsa.nn import VideoSparseAttention


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Sizes of the products of layers, as they are computed."""
    linear, found = nn.functional.linear, []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    monkeypatch.setattr(vsa.nn, "FEWEST_FUSED_TOKENS", 240)
    return found


def layer(**options: Any) -> VideoSparseAttention:
    torch.manual_seed(0)
    made = VideoSparseAttention(32, 4, topk=2, **{"gates": "both", "kv_heads": 2} | options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def step(made: VideoSparseAttention, autocast: bool = False) -> list[Tensor]:
    x = torch.randn(2, 4, 5, 6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = made(x)
    wanted = [x, *(p for p in made.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize("gates", ["coarse", "both"])
@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_of_separate_projections(
    gates: str, autocast: bool, products: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(gates=gates)
    found = step(made, autocast)
    assert products == [(64 + 32 * (1 + (gates == "both")), 32), (32, 32)]
    products.clear()
    monkeypatch.setattr(vsa.nn, "MOST_FUSED_CHANNELS", 31)
    expected = step(made, autocast)
    assert len(products) == 3 + (gates == "both")
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < (0.02 if autocast else 1e-5) * b.norm()


def test_fewer_tokens_go_apart(products: list, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    step(made)
    assert len(products) == 2
    monkeypatch.setattr(vsa.nn, "FEWEST_FUSED_TOKENS", 241)
    products.clear()
    step(made)
    assert len(products) == 4


class Doubled(nn.Linear):
    """As an adapter would stand in for a projection."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_who_is_in_the_way_is_called(products: list) -> None:
    made = layer()
    assert made.to_gate_fine is not None and made.to_gate_compress is not None
    plain = step(made)
    seen: list[str] = []
    handle = made.to_gate_fine.register_forward_hook(lambda *_: seen.append("forward"))
    assert torch.allclose(step(made)[0], plain[0], atol=1e-5) and seen == ["forward"]
    handle.remove()
    handle = made.to_qkv.register_full_backward_hook(lambda *_: seen.append("backward"))
    step(made)
    assert seen[1:] == ["backward"]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all"))
    step(made)
    handle.remove()
    assert seen[2:] == ["all"] * 5  # four projections and the layer
    products.clear()
    step(made)
    assert len(products) == 2  # as one again


def test_a_wrapped_forward_is_called(products: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate puts its hooks, which also bring weights, in place of the method."""
    made = layer()
    assert made.to_gate_fine is not None
    forward = made.to_gate_fine.forward
    monkeypatch.setattr(made.to_gate_fine, "forward", lambda x: 2 * forward(x))
    found = step(made)[0]
    assert len(products) == 4
    monkeypatch.undo()
    with torch.no_grad():
        for parameter in made.to_gate_fine.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(found, step(made)[0], rtol=1e-4, atol=1e-4)


def test_gates_of_other_widths_are_taken_as_they_are(products: list) -> None:
    """One number per channel is broadcast; what cannot be is refused, whatever the sum of all."""
    made = layer()
    made.to_gate_compress = nn.Linear(32, 8)
    step(made)
    assert products == [(64, 32), (8, 32), (32, 32), (32, 32)]
    made.to_gate_fine = nn.Linear(32, 56)
    with pytest.raises(ValueError, match=r"^gate_fine must be broadcastable"):
        step(made)


def test_what_stands_in_for_a_projection_counts(products: list) -> None:
    made = layer()
    doubled = Doubled(32, 32)
    assert made.to_gate_fine is not None
    doubled.load_state_dict(made.to_gate_fine.state_dict())
    made.to_gate_fine = doubled
    found = step(made)[0]
    assert len(products) == 4
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    made.to_gate_fine = nn.Linear(32, 32)
    made.to_gate_fine.load_state_dict(doubled.state_dict())
    torch.testing.assert_close(found, step(made)[0], rtol=1e-4, atol=1e-4)


def test_parametrized_frozen_and_missing_parts_go_apart(products: list) -> None:
    made = layer()
    made.to_qkv.requires_grad_(False)
    assert len(step(made)) == 1 + 1 + 6 and len(products) == 4
    products.clear()
    made = layer()
    parametrize.register_parametrization(made.to_gate_fine, "weight", nn.Tanh())
    step(made)
    assert len(products) == 4
    products.clear()
    step(layer(bias=False))
    assert len(products) == 4
    products.clear()
    step(layer(gates=None))
    assert products == [(64, 32), (32, 32)]


def test_compiled_layers_take_it_in_one_graph(products: list) -> None:
    made = layer()
    expected = step(made)
    found = step(torch.compile(made, fullgraph=True, backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
