# SPDX-License-Identifier: Apache-2.0
"""Sequences in PyTorch's machinery: compiled code, transforms, layers, plans, counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from python.test_no_waiting import READS
from sequences.cases import CASES, OTHER, VIDEO, Case, attend, gradients
from torch import Tensor
from torch.func import jvp

import vsa
from vsa import Segment
from vsa.stages import eager

MIXED = replace(CASES["ref2va"], dtype=torch.bfloat16, head_dim=64)
MASKED = replace(CASES["invalid text, two videos"], dtype=torch.bfloat16, head_dim=64)


def results(case: Case, function: Any = None, **options: Any) -> list[Tensor]:
    """Out, the choice, lse and all gradients."""
    given = {name: x.requires_grad_() for name, x in case.tensors().items()}
    valid = case.valid()  # compiled code makes no generator

    def call(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out, chosen, lse = attend(case, given, text_valid=valid, **options)
        return out, chosen.bitmap, lse

    out, bitmap, lse = (call if function is None else function(call))(given)
    return [out.detach(), bitmap, lse.detach(), *gradients(case, given, out, lse).values()]


@pytest.mark.parametrize(
    "backend, case",
    [("torch", replace(MASKED, batch=1)), ("emulated", MIXED)],
    ids=["masked", "mixed"],
)
def test_one_graph_with_the_bits_of_eager_calls(backend: str, case: Case) -> None:
    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for a, b in zip(
        results(case, backend=backend), results(case, compiled, backend=backend), strict=True
    ):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_share_that_changes_takes_two_graphs() -> None:
    traces = []
    sequence = vsa.Sequence([OTHER, VIDEO])
    q, k, v = torch.randn(3, 1, sequence.length, 1, 16)

    def count(module: Any, _: Any) -> Any:
        traces.append(module)
        return module

    step = torch.compile(
        lambda topk: vsa.attention(q, k, v, topk, grid=sequence),
        backend=count,
        fullgraph=True,
    )
    for topk in (0.2, 0.4, 0.6, 0.8):
        assert torch.equal(step(topk), vsa.attention(q, k, v, topk, grid=sequence))
    assert len(traces) == 2


@pytest.mark.parametrize("case", [MIXED, MASKED], ids=["mixed", "masked"])
def test_nothing_is_read_by_the_host(case: Case) -> None:
    """But what the emulator reads: here the operators that a GPU would be waited for."""
    results(case, backend="emulated")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        given = case.tensors()
        attend(case, given, backend="emulated")
    called = {event.key for event in profile.key_averages()}
    assert {"vsa::select_tiles", "vsa::padded_attention"} <= called
    assert not called & (READS - {"aten::equal"})


def test_the_same_bits_every_time() -> None:
    for a, b in zip(results(MIXED), results(MIXED), strict=True):
        assert torch.equal(a, b)


def test_forward_mode_agrees_with_reverse() -> None:
    case = replace(CASES["ref2va"], head_dim=8)
    tensors = case.tensors()
    given, gate = tuple(tensors[name] for name in "qkv"), tensors["gate_coarse"]
    tangents = tuple(case.tensors(seed=1)[name] for name in "qkv")

    def attention(*tokens: Tensor) -> Tensor:
        return vsa.attention(*tokens, case.topk, grid=case.sequence, gate_coarse=gate)

    _, tangent = jvp(attention, given, tangents)
    leaves = [x.clone().requires_grad_() for x in given]
    upstream = case.upstream()[0]
    grads = torch.autograd.grad(attention(*leaves), leaves, upstream)
    reverse = sum((x * y).sum() for x, y in zip(grads, tangents, strict=True))
    torch.testing.assert_close((tangent * upstream).sum(), reverse)


def test_autocast_and_strides_and_broadcast_gates() -> None:
    case = replace(MIXED, dtype=torch.float32)
    q, k, v = (case.tensors()[name] for name in "qkv")
    gate = torch.randn(1, 1, case.heads, 1)
    kinds = {"grid": case.sequence, "gate_coarse": gate}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vsa.attention(q, k.bfloat16(), v, case.topk, **kinds)
    low = [x.bfloat16() for x in (q, k, v)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, vsa.attention(*low, case.topk, **kinds))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in low]
    assert torch.equal(out, vsa.attention(*turned, case.topk, **kinds))
    full = vsa.attention(*low, case.topk, grid=case.sequence, gate_coarse=gate.expand(q.shape))
    assert torch.equal(out, full)


def test_a_layer_takes_a_sequence() -> None:
    torch.manual_seed(0)
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=1.0, gates="both").double()
    sequence = vsa.Sequence([7, OTHER, 3, VIDEO])
    x = torch.randn(2, sequence.length, 32).double()
    q, k, v, *_ = layer.projections(x)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (q, k, v))
    )
    torch.testing.assert_close(layer(x, sequence), layer.to_out(dense.transpose(1, 2).flatten(2)))
    layer.topk = 0.3
    assert not torch.equal(
        layer(x, sequence), layer(x, vsa.Sequence([7 + OTHER.tokens + 3, VIDEO]))
    )


def test_plans_step_aside_or_serve_the_grid() -> None:
    """A sequence that is a grid has the grid's plan; no plan is made of any other."""
    before = set(eager._plans.values)
    results(MIXED, backend="emulated")
    assert set(eager._plans.values) == before
    case = replace(MIXED, segments=(9, VIDEO), topk=2, gates=())
    results(case, backend="emulated")
    assert len(set(eager._plans.values) - before) == 1
    first = results(case, backend="emulated")
    assert all(
        torch.equal(a, b) for a, b in zip(first, results(case, backend="emulated"), strict=True)
    )


@pytest.mark.parametrize("backward", [False, True])
def test_operations_of_a_grid_are_those_of_its_sequence(backward: bool) -> None:
    grid = vsa.Grid((5, 6, 7), prefix=9, suffix=4)
    sequence = vsa.Sequence([9, (5, 6, 7), 4])
    options: dict
    for options in ({}, {"score": vsa.SubBlocks(2)}, {"tail": True}):
        assert vsa.flops(grid, 4, 64, 2, backward, **options) == vsa.flops(
            sequence, 4, 64, 2, backward, **options
        )


def test_operations_follow_the_choice() -> None:
    """Pairs of tokens by a count of what is attended."""
    sequence = vsa.Sequence([6, Segment((1, 4, 8), (1, 4, 4), topk=1), (2, 4, 4)])
    flops = vsa.flops(sequence, 1, 16, 1, backward=False)
    # 64 video tokens attend 6 of text, 16 of the first video and all 32 of the second.
    assert flops.fine == 4 * 16 * (64 * (6 + 16 + 32) + 6 * 70)
    assert flops.full == 4 * 16 * 70 * 70
    assert flops.select == 2 * 16 * 3 * 3


def test_a_mask_of_a_sequence_that_is_a_grid() -> None:
    """Goes along with the grid; other sequences refuse it."""
    mask = vsa.masks.Window((1, 1, 1))
    grid, of = vsa.Grid((5, 9, 9), prefix=7), vsa.Sequence([7, (5, 9, 9)])
    q, k, v = torch.randn(3, 1, grid.length, 2, 16)
    assert torch.equal(
        vsa.attention(q, k, v, 0.5, grid=of, mask=mask),
        vsa.attention(q, k, v, 0.5, grid=grid, mask=mask),
    )
    assert vsa.flops(of, 2, 16, 0.5, mask=mask) == vsa.flops(grid, 2, 16, 0.5, mask=mask)
    mixed = vsa.Sequence([7, (5, 9, 3), (5, 9, 6)])
    with pytest.raises(ValueError, match=r"^mask must be None for this grid, but it is of type"):
        vsa.attention(q, k, v, 0.5, grid=mixed, mask=mask)
