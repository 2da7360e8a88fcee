# SPDX-License-Identifier: Apache-2.0
"""Compiled attention on a backend that fuses gates: one operator, the bits of eager calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from python.planned_calls import ALL, BASE, FLAT, GATED, Call, given, outcome, unplanned
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import vsa
from vsa.backends.kernels import whole
from vsa.values.remembered import Remembered

NO_MASK = [], None, []
CALLS = {
    "plain": BASE,
    "trained": BASE._replace(wants="qkv"),
    "flat": Call(FLAT, kv_heads=1, wants="qkv"),
    "gates": GATED,
    "gates trained": ALL,
    "coarse gate": Call(gates=(None, "contiguous"), wants="qkvc"),
    "fine gate": Call(gates=("contiguous", None), wants="qkvf"),
    "fp32 gates": Call(gates=("fp32", "fp32"), wants="qkvfc"),
    "broadcast gates": Call(gates=("broadcast", "expanded"), wants="qkvfc"),
    "mass": Call(topk=vsa.TopP(0.5), wants="qkv"),
    "per head": Call(topk=(1, 2), gates=(None, "contiguous"), wants="qkvc"),
    "negative scale": Call(scale=-0.25, gates=(None, "contiguous"), wants="qkvc"),
    "odd address": Call(strides="odd address", wants="qkv"),
    "heads outside": Call(strides="heads outside", wants="qkv"),
    "part": Call(strides="part", gates=("part", "part"), wants="qkvfc"),
    "gradient of lse": Call(upstream="both", wants="qkv", dtype=torch.float16),
    "transposed gradient": Call(upstream="transposed", wants="qkv"),
    "autocast": Call(autocast=True, wants="qkv"),
    "runs": Call(score=vsa.SubBlocks(4), kv_heads=1),
    "runs trained": Call(score=vsa.SubBlocks(7), gates=("fp32", "contiguous"), wants="qkvfc"),
    "runs by mass": Call(score=vsa.SubBlocks(4), topk=vsa.TopP(0.5), scale=-0.25, wants="qkv"),
    "runs at an odd address": Call(score=vsa.SubBlocks(4), strides="odd address"),
    "text": Call(text=(7, 66), gates=("contiguous", "contiguous"), wants="qkvfc"),
    "masked text": Call(text=(0, 70), valid="some", gates=("contiguous", None), wants="qkvf"),
    "masked text alone": Call(text=(70, 3), valid="some", wants="qkv"),
}


class Compiled:
    """``vsa.attention`` in one graph, in place of the eager one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(vsa.attention, fullgraph=True, backend=self.counter)
        monkeypatch.setattr(vsa, "attention", compiled)
        monkeypatch.setattr(whole, "_prepared", Remembered(256))


def operators_of(call: Callable[[], Any]) -> list[list[str]]:
    """Names of our operators in the graphs of a compiled call: forward, then backward."""

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        found.append([x._opname for x in targets if getattr(x, "namespace", "") == "vsa"])
        return make_boxed_func(graph.forward)

    found: list[list[str]] = []
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    out = torch.compile(call, fullgraph=True, backend=backend)()
    if out.requires_grad:
        out.sum().backward()
    return found


@pytest.mark.parametrize("name", CALLS)
def test_bits_of_the_eager_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]
    expected = unplanned(call.run)
    assert isinstance(expected, list), expected
    Compiled(monkeypatch)
    found = outcome(call.run)
    assert isinstance(found, list), found
    assert [x[-1] for x in found] == [x[-1] for x in expected]
    assert [x[0] for x in found] == [x[0] for x in expected]
    assert outcome(call.run) == found  # by what the first run left


def test_which_calls_run_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare the long way with itself."""
    Compiled(monkeypatch)
    for name in ("trained", "gates trained", "broadcast gates", "mass", "part"):
        CALLS[name].run()
        assert all(known[0] is not None for known in whole._prepared.values.values()), name
    before = len(whole._prepared.values)
    CALLS["odd address"].run()
    assert len(whole._prepared.values) == before


def test_one_operator_in_each_direction() -> None:
    tensors = given(ALL)

    def step() -> Tensor:
        return vsa.attention(**tensors, topk=2, grid=(4, 5, 6), backend="emulated")

    assert operators_of(step) == [["attention"], ["attention_backward"]]
    with torch.no_grad():
        assert operators_of(step) == [["attention_inference"]]


def test_text_goes_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = vsa.Grid((4, 4, 5), prefix=3, suffix=2)
    valid = torch.tensor([[True, False, True, True, False]])
    tensors = [torch.randn(1, grid.length, 2, 64).bfloat16().requires_grad_() for _ in range(5)]
    q, k, v, fine, coarse = tensors

    def run() -> list[Tensor]:
        out = vsa.attention(
            q, k, v, 1, grid=grid, gate_fine=fine, gate_coarse=coarse, text_valid=valid,
            backend="emulated",
        )  # fmt: skip
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    expected = run()
    Compiled(monkeypatch)
    for found, wanted in zip(run(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["gates", "gates trained", "fine gate", "trained", "flat"])
def test_opcheck(name: str) -> None:
    call = CALLS[name]
    q, k, v, fine, coarse = (x if x is None else x.flatten(1, -3) for x in call.tensors())
    grid = vsa.Grid((4, 5, 6)).as_ints()
    arguments = (
        q,
        k,
        v,
        fine,
        coarse,
        None,
        [2],
        0.0,
        None,
        grid,
        grid,
        1,
        0.125,
        "emulated",
        *NO_MASK,
    )
    torch.library.opcheck(torch.ops.vsa.attention, arguments)
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.vsa.attention_inference, arguments)
    out, lse, bitmap, part, rows, means = torch.ops.vsa.attention(*arguments)
    saved = part if part.numel() else out, lse, bitmap, rows, means
    for grad_lse in (None, torch.randn_like(lse)):
        backward = torch.randn_like(out), grad_lse, *saved, *arguments
        torch.library.opcheck(torch.ops.vsa.attention_backward, backward)


def test_other_backends_have_no_such_operator() -> None:
    q, k, v = torch.randn(3, 1, 64, 2, 64)
    grid = vsa.Grid((4, 4, 4)).as_ints()
    arguments = (q, k, v, None, None, None, [1], 0.0, None, grid, grid, 1, 0.125, "torch", *NO_MASK)
    with pytest.raises(NotImplementedError, match=r"^backend 'torch' has no operator for whole"):
        torch.ops.vsa.attention_inference(*arguments)


def test_a_budget_that_varies_needs_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 4, 8, 8, 2, 64).bfloat16() for _ in range(3))
    expected = [vsa.attention(q, k, v, topk, backend="emulated") for topk in (1, 2, 3)]
    graph = Compiled(monkeypatch)
    for topk, wanted in zip((1, 2, 3), expected, strict=True):
        assert torch.equal(vsa.attention(q, k, v, topk, backend="emulated"), wanted)
    assert graph.counter.frame_count <= 2


def test_grids_that_vary_need_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(4, 5, 6), (4, 6, 8), (5, 8, 9), (6, 10, 9)]
    inputs = [[torch.randn(1, *size, 2, 64).bfloat16() for _ in range(3)] for size in sizes]
    expected = [vsa.attention(*x, 0.4, backend="emulated") for x in inputs]
    graph = Compiled(monkeypatch)
    for x, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(vsa.attention(*x, 0.4, backend="emulated"), wanted)
    assert graph.counter.frame_count <= 3


@pytest.mark.parametrize("name", ["trained", "gates trained"])
def test_flops_are_those_of_eager_calls(name: str) -> None:
    """A counter sees no compiled code at work, but whoever calls the operators."""
    call = CALLS[name]
    tensors = given(call)
    with FlopCounterMode(display=False) as eager:
        out = vsa.attention(**tensors, topk=2, grid=(4, 5, 6), backend="emulated")
        out.sum().backward()
    q, k, v, fine, coarse = (x if x is None else x.flatten(1, -3) for x in tensors.values())
    grid = vsa.Grid((4, 5, 6)).as_ints()
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.vsa.attention(
            q, k, v, fine, coarse, None, [2], 0.0, None, grid, grid, 1, 0.125, "emulated", *NO_MASK
        )[0]
        out.sum().backward()
    assert counter.get_total_flops() == eager.get_total_flops() > 0


@pytest.mark.parametrize("name", ["gates trained", "coarse gate", "trained"])
@pytest.mark.parametrize("compiled", [False, True])
def test_saved_tensors_laid_out_anew(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks of autograd owe the numbers, not the strides."""
    call = CALLS[name]
    expected = unplanned(call.run)
    if compiled:
        Compiled(monkeypatch)

    def moved(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.ndim > 1 else torch.stack((x, x), 1)[:, 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), moved):
        assert outcome(call.run) == expected
        assert unplanned(call.run) == expected


def test_dynamo_leaves_operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs inside of a frame that dynamo has broken off: it would free their memory."""
    seen: list[str] = []
    monkeypatch.setattr(whole, "_prepared", Remembered(256))

    def look(graph: torch.fx.GraphModule, _: object) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    q, k, v, fine, coarse = (x if x is None else x.flatten(1, -3) for x in GATED.tensors())
    grid = vsa.Grid((4, 5, 6)).as_ints()
    arguments = (
        q,
        k,
        v,
        fine,
        coarse,
        None,
        [2],
        0.0,
        None,
        grid,
        grid,
        1,
        0.125,
        "emulated",
        *NO_MASK,
    )

    def broken_off() -> list[Tensor]:
        try:
            torch._dynamo.graph_break()
            return list(torch.ops.vsa.attention_inference(*arguments))
        finally:
            torch._dynamo.graph_break()

    expected = torch.ops.vsa.attention_inference(*arguments)
    for found, wanted in zip(torch.compile(broken_off, backend=look)(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not [name for name in seen if "vsa" not in name]


def test_tensors_of_another_device_are_refused() -> None:
    q, k, v = torch.randn(3, 1, 64, 2, 64).bfloat16()
    grid = vsa.Grid((4, 4, 4)).as_ints()
    arguments = (
        q,
        k,
        v,
        None,
        None,
        None,
        [1],
        0.0,
        None,
        grid,
        grid,
        1,
        0.125,
        "hopper",
        *NO_MASK,
    )
    with pytest.raises(ValueError, match=r"^backend 'hopper' takes tensors on cuda devices"):
        torch.ops.vsa.attention_inference(*arguments)
