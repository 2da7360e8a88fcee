# SPDX-License-Identifier: Apache-2.0
"""Prepared calls of the drop-ins: the bits of the first call, and who has a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drop_ins.padded import Call, numbers
from drop_ins.test_padded import MANY, attend, lists_of
from torch import Tensor

import vsa
from vsa.drop_ins import planned
from vsa.stages import eager

BF16 = MANY._replace(dtype=torch.bfloat16, head_dim=64, kv_sizes=(9, 64, 0, 64, 64, 30, 2))
LISTED = Call(
    (64, 64, 64), (64, 5, 0, 33), batch=2, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What ran by a plan."""
    found: list[str] = []
    run = planned._run

    def counted(*given: Any) -> Any:
        found.append("plan")
        return run(*given)

    monkeypatch.setattr(planned, "_run", counted)
    eager._plans.values.clear()
    yield found
    eager._plans.values.clear()


@pytest.mark.parametrize("weight", ["full", "per head", None], ids=str)
def test_a_second_call_has_a_plan_and_the_bits_of_the_first(
    weight: str | None, machine: tuple[str, str], ran: list[str]
) -> None:
    backend, device = machine
    call = BF16._replace(weight=weight)
    first = attend(call, call.tensors(), device, backend=backend)
    assert not ran
    again = attend(call, call.tensors(), device, backend=backend)
    assert ran == ["plan"]
    for name, x in first.items():
        torch.testing.assert_close(x, again[name], rtol=0, atol=0, msg=name)
    other = call._replace(sizes=(1, 0, 64), kv_sizes=(64, 1, 2, 0, 3, 64, 64))
    planned_other = attend(other, other.tensors(3), device, backend=backend)
    assert ran == ["plan"] * 2
    eager._plans.values.clear()
    expected = attend(other, other.tensors(3), device, backend=backend)
    for name, x in expected.items():
        torch.testing.assert_close(x, planned_other[name], rtol=0, atol=0, msg=name)


def given(call: Call, device: str, volume: int = 64) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k and v that want gradients, a map and sizes of the keys."""
    whole = call._replace(sizes=[volume] * len(call.sizes), kv_sizes=call.of_keys, volume=volume)
    tensors = whole.tensors()
    x = [tensors[name].detach().to(device).requires_grad_() for name in "qkv"]
    return x, whole.lists(), numbers(whole.of_keys).to(device)


@pytest.mark.parametrize("volume", [64, 128, 256])
@pytest.mark.parametrize("form", ["map", "lists", "lists of int64"])
def test_maps_and_lists(form: str, volume: int, machine: tuple[str, str], ran: list[str]) -> None:
    backend, device = machine
    x, kept, sizes = given(LISTED, device, volume)
    kept[0, 0, 0] = True  # a row that is far longer than most

    def run() -> list[Tensor]:
        if form == "map":
            out, lse = vsa.block_sparse_attn(*x, kept.to(device), sizes, backend=backend)
        else:
            lists, counts = (y.to(device) for y in lists_of(kept))
            if "int64" in form:
                lists, counts = lists.long(), counts.long()
            out, lse = vsa.block_sparse_attn_from_indices(*x, lists, counts, sizes, backend=backend)
        loss = out.double().square().sum() + lse[lse.isfinite()].double().sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, x)]

    first, again = run(), run()
    assert ran == ["plan"]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.no_grad():
        run_once = vsa.block_sparse_attn(*x, kept.to(device), sizes, backend=backend)
        by_plan = vsa.block_sparse_attn(*x, kept.to(device), sizes, backend=backend)
    assert torch.equal(run_once[0], by_plan[0]) and torch.equal(run_once[0], first[0])


def test_a_list_may_name_a_tile_twice_and_more_than_a_thousand(ran: list[str]) -> None:
    tiles = 1100
    x = [torch.randn(1, 1, n * 64, 64).bfloat16() for n in (1, tiles, tiles)]
    lists = torch.tensor([1030, 7, 1030, 1099, 0], dtype=torch.int32).view(1, 1, 1, 5)
    counts, sizes = torch.full((1, 1, 1), 4, dtype=torch.int32), numbers([64] * tiles)
    results = [
        vsa.block_sparse_attn_from_indices(*x, lists, counts, sizes, backend="emulated")
        for _ in range(2)
    ]
    assert ran == ["plan"]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_numbers_are_read_on_a_cpu_by_plans_too(ran: list[str]) -> None:
    x, kept, sizes = given(LISTED, "cpu")
    lists, counts = lists_of(kept)
    call = vsa.block_sparse_attn_from_indices
    for _ in range(2):
        call(*x, lists, counts, sizes, backend="emulated")
    assert ran == ["plan"]
    counts[0, 0, 0] = 99
    with pytest.raises(ValueError, match=r"^q2k_num must hold counts from 0 to 4"):
        call(*x, lists, counts, sizes, backend="emulated")
    counts[0, 0, 0] = 1
    lists[0, 0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"^q2k_idx must hold key tiles from 0 to 3"):
        call(*x, lists, counts, sizes, backend="emulated")
    sizes[0] = 65
    for name in ("block_sparse_attn", "video_sparse_attn"):
        rest = (kept, sizes) if name == "block_sparse_attn" else (sizes, None, 2)
        with pytest.raises(ValueError, match=r"^variable_block_sizes must hold"):
            getattr(vsa, name)(*x, *rest, backend="emulated")


def test_who_has_no_plan(ran: list[str]) -> None:
    tensors = BF16.tensors()

    def run(**options: Any) -> None:
        for _ in range(2):
            attend(BF16, tensors, backend="emulated", **options)

    run(validate=True)
    with eager.paused():
        run()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        run()
    budget = BF16._replace(topk=torch.tensor(2))
    for _ in range(2):
        attend(budget, tensors, backend="emulated")
    assert not ran


def test_another_kind_has_another_plan(ran: list[str]) -> None:
    """What differs by more than numbers in tensors goes the whole way once."""
    calls = [
        BF16,
        BF16._replace(topk=1),
        BF16._replace(topk=1.0),
        BF16._replace(weight=None),
        BF16._replace(batch=1),
        BF16._replace(dtype=torch.float16),
    ]
    for call in calls:
        attend(call, call.tensors(), backend="emulated")
    assert not ran


def test_autocast_and_a_gradient_that_is_differentiated_again(ran: list[str]) -> None:
    """Casts are part of a plan; a backward under ``create_graph`` goes by the operators."""
    wide = BF16._replace(dtype=torch.float32)
    tensors = wide.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (attend(wide, tensors, backend="emulated") for _ in range(2))
    assert ran == ["plan"]
    for name, x in first.items():
        torch.testing.assert_close(x, again[name], rtol=0, atol=0, msg=name)
    q, k, v, weight = (tensors[x].bfloat16().requires_grad_() for x in ("q", "k", "v", "weight"))
    sizes = numbers(BF16.of_keys), numbers(BF16.sizes)
    grads = []
    for _ in range(2):
        out = vsa.video_sparse_attn(q, k, v, *sizes, 2, 64, weight, backend="emulated")
        upstream = tensors["grad"].bfloat16()
        kept = torch.autograd.grad(out, (q, k, v, weight), upstream, create_graph=True)
        grads.append([x.detach() for x in kept])
    assert ran == ["plan"] * 2
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
