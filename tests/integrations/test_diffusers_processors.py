# SPDX-License-Identifier: Apache-2.0
"""What the processors do around attention: rotation, and the projections that adapters wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_ltx
from integrations.tiny_transformers import FAMILIES, run, wan

from vsa.integrations.diffusers import apply_vsa
from vsa.integrations.diffusers.rotary import of_pairs, turn_pairs


def tables(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(9, channels) cosines and sines, every angle twice."""
    angles = torch.randn(9, channels // 2, dtype=torch.float64).repeat_interleave(2, dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotation_has_the_bits_of_diffusers(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 3, 16).to(dtype)
    rotary = tables(16, torch.float32)
    cos, sin = (table.unsqueeze(1) for table in of_pairs(rotary))
    (turned,) = turn_pairs((x,), cos, sin)
    expected = apply_rotary_emb(x.float() if dtype != torch.float64 else x, rotary, sequence_dim=1)
    tolerance = 1e-6 if dtype == torch.float64 else 0  # diffusers rounds fp64 to fp32
    torch.testing.assert_close(turned, expected.to(dtype), rtol=0, atol=tolerance)
    flat = x.flatten(2)
    whole = tuple(table.repeat(1, 3)[None] for table in rotary)
    (over_heads,) = turn_pairs((flat,), *of_pairs(whole))
    expected = transformer_ltx.apply_rotary_emb(flat, whole)
    torch.testing.assert_close(over_heads, expected, rtol=0, atol=tolerance)


def test_rotation_is_the_same_compiled_in_parts_of_tensors_and_with_16_bit_tables() -> None:
    x = torch.randn(2, 9, 3, 48, requires_grad=True)
    part = x.chunk(3, dim=-1)[1]
    cos, sin = (table.unsqueeze(1) for table in of_pairs(tables(16, torch.float32)))
    (eager,) = turn_pairs((part,), cos, sin)
    compiled = torch.compile(turn_pairs, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled((part,), cos, sin)[0], eager)
    grads = [
        torch.autograd.grad(out.square().sum(), x)[0]
        for out in (eager, compiled((part,), cos, sin)[0])
    ]
    torch.testing.assert_close(*grads)
    (coarse,) = turn_pairs((part,), cos.bfloat16(), sin.bfloat16())
    torch.testing.assert_close(coarse, eager, rtol=2e-2, atol=2e-2)


class LowRank(nn.Module):
    """A linear layer with an adapter around it, as LoRA does it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_around_the_projections_work_and_learn(family: Any) -> None:
    model, inputs = family()
    model.requires_grad_(False)
    adapted = []
    apply_vsa(model, topk=1.0)
    for attn in model._vsa_plan.layers.values():
        for projection in ("to_q", "to_k", "to_v", "to_query", "to_key", "to_value"):
            if hasattr(attn, projection):
                setattr(attn, projection, LowRank(getattr(attn, projection)))
                adapted.append(getattr(attn, projection))
    assert len(adapted) == 6
    sparse = run(model, inputs)
    sparse.square().sum().backward()
    assert all(each.down.weight.grad.abs().sum() > 0 for each in adapted)
    from vsa.integrations.diffusers import remove_vsa

    with torch.no_grad():
        dense = run(remove_vsa(model), inputs)
        torch.testing.assert_close(sparse.detach(), dense, rtol=1e-4, atol=1e-4)
        for each in adapted:
            each.up.weight.zero_()
        assert (run(model, inputs) - dense).abs().max() > 1e-4


def test_gates_stay_where_adapters_are_added_later() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2, gates="coarse")
    plain = run(model, inputs)
    for block in model.blocks:
        block.attn1.to_q = LowRank(block.attn1.to_q)
        nn.init.zeros_(block.attn1.to_q.up.weight)
    assert torch.equal(run(model, inputs), plain)
    apply_vsa(model, topk=2, gates="coarse")
    assert torch.equal(run(model, inputs), plain)
