# SPDX-License-Identifier: Apache-2.0
"""The drop-ins against the definition over padded tiles, NaN in all padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drop_ins.padded import (
    Call,
    Rows,
    errors_of_sdpa,
    excess,
    numbers,
    padding,
    poisoned,
    reference,
    to_padded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vsa
from vsa.verify import padded_reference

MANY = Call((64, 1, 40), heads=4, kv_heads=2, batch=2)
CALLS = {
    "plain": Call(),
    "no weight": Call(weight=None),
    "weight per head": Call(weight="per head", topk=0.5),
    "whole tiles": Call((64, 64, 64)),
    "one tile": Call((5,), topk=1),
    "other keys": MANY._replace(kv_sizes=(9, 64, 0), topk=1),
    "more keys": MANY._replace(kv_sizes=(9, 64, 0, 64, 64, 30, 2), topk=5),
    "grouped heads": MANY,
    "topk above all": MANY._replace(topk=99),
    "only empty keys": Call((64, 3), kv_sizes=(0, 0), topk=2),
    "large scores": MANY._replace(magnitude=30.0),
    "128 slots": Call((128, 70, 64, 3), volume=128, heads=2),
    "256 slots": Call((256, 130, 0), volume=256, weight="per head"),
    "128 slots, other keys": Call((128, 70), kv_sizes=(1, 128, 90), volume=128, topk=1),
}
BLOCKS = {64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}


def attend(
    call: Call, tensors: dict[str, Tensor], device: str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """Out and all gradients of ``vsa.video_sparse_attn``, by name."""
    wants = options.get("backend") != "flex"  # which has no gradients on a CPU
    given = {
        name: x.to(device).detach().clone().requires_grad_(wants)
        for name, x in tensors.items()
        if not name.startswith("grad")
    }
    out = vsa.video_sparse_attn(
        given["q"],
        given["k"],
        given["v"],
        numbers(call.of_keys).to(device),
        numbers(call.sizes).to(device),
        call.topk,
        BLOCKS[call.volume],
        given.get("weight"),
        **options,
    )
    if not wants:
        return {"out": out}
    grads = torch.autograd.grad(out, list(given.values()), tensors["grad"].to(device))
    return {"out": out.detach()} | dict(zip(given, grads, strict=True))


def truth_of(call: Call, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The same by the definition in fp64, and the choice; the weight as it is broadcast."""
    wide = {
        name: (x.expand(tensors["q"].shape) if name == "weight" else x).double().requires_grad_()
        for name, x in tensors.items()
        if not name.startswith("grad")
    }
    out, kept = reference(call, wide)
    real = ~padding(call.sizes, call.volume)
    upstream = tensors["grad"].double()[:, :, real]
    grads = [torch.zeros_like(x) for x in wide.values()]
    if out.requires_grad:  # not where there is no key at all
        grads = torch.autograd.grad(
            out[:, :, real],
            list(wide.values()),
            upstream,
            allow_unused=True,
            materialize_grads=True,
        )
    return {"out": out.detach()} | dict(zip(wide, grads, strict=True)), kept


def check(call: Call, machine: tuple[str, str]) -> None:
    """Numbers of a call are the definition's, and padding holds zeros."""
    backend, device = machine
    tensors = call.tensors()
    found = attend(call, tensors, device, backend=backend)
    truth, kept = truth_of(call, tensors)
    of_sdpa = errors_of_sdpa(call, kept)
    for name, x in found.items():
        sizes = call.of_keys if name in ("k", "v") else call.sizes
        if name != "weight" or call.weight == "full":
            assert not x[:, :, padding(sizes, call.volume)].any(), name
        assert x.dtype == tensors["q"].dtype
        of_torch, exact = of_sdpa.get(name, of_sdpa["out"]), truth[name]
        if name == "weight":  # a sum over what it is broadcast to, whose terms may cancel
            of_torch *= float(exact.abs().sum_to_size(x.shape).norm())
            exact = exact.sum_to_size(x.shape)
            of_torch /= float(exact.norm()) or 1
        times = excess(x, exact, of_torch, call.dtype)
        assert times <= 2, (name, times)


@pytest.mark.parametrize("name", CALLS)
def test_definition(name: str) -> None:
    check(CALLS[name], ("torch", "cpu"))


SOME = ["grouped heads", "weight per head", "128 slots"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    check(CALLS[name]._replace(dtype=dtype), ("torch", "cpu"))


@pytest.mark.parametrize("name", [*SOME, "other keys", "only empty keys"])
def test_definition_on_flex(name: str) -> None:
    check(CALLS[name]._replace(dtype=torch.float32), ("flex", "cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CALLS)
def test_definition_on_kernels(
    name: str, head_dim: int, dtype: torch.dtype, machine: tuple[str, str]
) -> None:
    check(CALLS[name]._replace(dtype=dtype, head_dim=head_dim), machine)


sizes_of_tiles = st.lists(st.integers(0, 64), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=sizes_of_tiles,
    kv_sizes=st.one_of(st.none(), sizes_of_tiles),
    shape=st.sampled_from([(1, 1, 1), (2, 2, 1), (1, 3, 3)]),
    topk=st.one_of(st.integers(1, 6), st.floats(0.1, 1.0)),
    weight=st.sampled_from(["full", "per head", None]),
)
def test_any_sizes(sizes, kv_sizes, shape, topk, weight) -> None:
    batch, heads, kv_heads = shape
    call = Call(sizes, kv_sizes, batch, heads, kv_heads, 8, topk=topk, weight=weight)
    if any(sizes):
        check(call, ("torch", "cpu"))


def lists_of(kept: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A map as lists in random order; what stands after a row's count is out of range."""
    order = torch.rand(kept.shape, generator=torch.Generator().manual_seed(seed))
    column = order.masked_fill(~kept, 2).argsort(-1)
    counts = kept.sum(-1)
    listed = torch.arange(kept.shape[-1]) < counts[..., None]
    return torch.where(listed, column, -7).int(), counts.int()


@pytest.mark.parametrize("name", ["plain", "other keys", "more keys", "128 slots", "256 slots"])
def test_map_and_lists(name: str) -> None:
    check_lists(CALLS[name], ("torch", "cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["other keys", "more keys", "128 slots, other keys"])
def test_map_and_lists_on_kernels(
    name: str, head_dim: int, dtype: torch.dtype, machine: tuple[str, str]
) -> None:
    check_lists(CALLS[name]._replace(dtype=dtype, head_dim=head_dim), machine)


def check_lists(call: Call, machine: tuple[str, str]) -> None:
    """Out, log-sum-exp and gradients of the fine stage alone; all query rows are real there."""
    backend, device = machine
    whole = call._replace(sizes=[call.volume] * len(call.sizes), kv_sizes=call.of_keys)
    tensors, kept = whole.tensors(), whole.lists()
    upstream = tensors["grad"], tensors["grad_lse"].double()
    results = []
    for form in ("definition", "map", "lists"):
        x = [tensors[name].detach() for name in "qkv"]
        x = [t.double() if form == "definition" else t.to(device) for t in x]
        x = [t.clone().requires_grad_() for t in x]
        sizes = numbers(whole.of_keys).to(device)
        if form == "definition":
            q, k, v = x
            out, lse = padded_reference.block_sparse_attn(
                Rows(q), k, v, kept, whole.of_keys, whole.volume
            )
        elif form == "map":
            out, lse = vsa.block_sparse_attn(*x, kept.to(device), sizes, backend=backend)
        else:
            lists = (y.to(device) for y in lists_of(kept))
            out, lse = vsa.block_sparse_attn_from_indices(*x, *lists, sizes, backend=backend)
        assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
        loss = (out.double() * upstream[0].to(out.device).double()).sum()
        # Rows without keys have -inf, whose gradient nobody takes.
        some = lse.isfinite()
        loss = loss + (lse.double() * upstream[1].to(out.device))[some].sum()
        grads = torch.autograd.grad(loss, x)
        results.append([y.detach().cpu() for y in (out, lse, *grads)])
    truth, by_map, by_lists = results
    assert all(torch.equal(a, b) for a, b in zip(by_map, by_lists, strict=True))
    nothing = truth[1] == float("-inf")
    assert nothing.any() and not by_map[0][nothing].any()
    assert torch.equal(by_map[1] == float("-inf"), nothing)
    assert (by_map[1].double() - truth[1])[~nothing].abs().max() < 1e-4
    of_sdpa = errors_of_sdpa(whole, kept)
    for name, place in (("out", 0), ("q", 2), ("k", 3), ("v", 4)):
        assert excess(by_map[place], truth[place], of_sdpa[name], whole.dtype) <= 2, name


@pytest.mark.parametrize("grid", [(5, 6, 9), (4, 8, 4), (3, 2, 11)], ids=str)
def test_as_attention_on_the_same_video(grid: tuple[int, int, int]) -> None:
    """Tokens gathered into padded tiles, and ours where they stand: the same numbers."""
    of = vsa.Grid(grid)
    x = [torch.randn(2, of.length, heads, 16).double() for heads in (4, 2, 2, 4, 4)]
    raster = [t.clone().requires_grad_() for t in x[:4]]
    out = vsa.attention(*raster[:3], 3, grid=of, gate_coarse=raster[3])
    truth = [out.detach(), *torch.autograd.grad(out, raster, x[4])]
    padded = [to_padded(t, of, float("nan")).requires_grad_() for t in x[:4]]
    found = vsa.video_sparse_attn(*padded[:3], of.sizes, of.sizes, 3, (4, 4, 4), padded[3])
    grads = torch.autograd.grad(found, padded, to_padded(x[4], of, float("nan")))
    for a, b in zip(truth, [found.detach(), *grads], strict=True):
        torch.testing.assert_close(b, to_padded(a, of, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bits_of_the_kernels_do_not_depend_on_padding(
    head_dim: int, dtype: torch.dtype, machine: tuple[str, str]
) -> None:
    call = MANY._replace(dtype=dtype, head_dim=head_dim)
    backend, device = machine
    results = [
        attend(call, call.tensors(fill=fill), device, backend=backend)
        for fill in (float("nan"), 0.0, float("inf"))
    ]
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_strides_are_free(machine: tuple[str, str]) -> None:
    """(B, S, heads, head_dim) underneath, as hosts hold it before they transpose."""
    call, (backend, device) = MANY._replace(dtype=torch.bfloat16, head_dim=64), machine
    tensors = call.tensors()
    found = attend(call, tensors, device, backend=backend)
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    again = attend(call, turned, device, backend=backend)
    for name, x in found.items():
        torch.testing.assert_close(x, again[name], rtol=0, atol=0)


def test_poison_reaches_what_attends_it() -> None:
    """Else the tests above would say nothing: a NaN in a real token is seen."""
    call = Call((64, 17), topk=2)
    tensors = call.tensors()
    tensors["v"][0, 0, 16] = float("nan")
    assert attend(call, tensors, backend="torch")["out"].isnan().any()
    tensors = call.tensors()
    assert tensors["v"][0, 0, 64 + 17].isnan().all()
    assert poisoned(tensors["v"], call.sizes, 64, 0.0).isfinite().all()
