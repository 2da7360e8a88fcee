# SPDX-License-Identifier: Apache-2.0
"""vsa.attention as a whole: one graph under torch.compile, no wait for the device, capturable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vsa
from vsa.values.budget import TopK

Machine = tuple[str, str]

BUDGETS = [
    pytest.param(3, id="number"),
    pytest.param(0.3, id="share"),
    pytest.param(vsa.TopP(0.7, floor=2), id="mass"),
    pytest.param((3, 0.5, 1.0), id="per-head"),
    pytest.param(1.0, id="everything"),
]
GATES = [
    pytest.param((), id="no-gates"),
    pytest.param(("gate_coarse",), id="coarse"),
    pytest.param(("gate_coarse", "gate_fine"), id="both"),
    pytest.param(("gate_fine", "tail"), id="tail"),
]
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose result the host has to wait for."""


class Layer:
    """Two calls on the same inputs, the second with the selection of the first; text and GQA."""

    def __init__(self, backend: str, device: str, topk: TopK, gates: tuple[str, ...]) -> None:
        self.grid = vsa.Grid((5, 4, 6), prefix=3, suffix=2)
        size = 2, self.grid.length
        self.leaves = {
            name: torch.randn(*size, heads, 64, device=device).bfloat16().requires_grad_()
            for name, heads in (("q", 3), ("k", 1), ("v", 1), *((gate, 3) for gate in gates))
            if name != "tail"
        }
        self.tail = "tail" in gates
        self.upstream = torch.randn(*size, 3, 64, device=device).bfloat16()
        self.valid = torch.tensor([[True, False, True, True, True]] * 2, device=device)
        self.topk, self.backend = topk, backend

    def forward(self, **tensors: Tensor) -> Tensor:
        """The sum of both outputs."""
        options = {"grid": self.grid, "text_valid": self.valid, "backend": self.backend}
        options["tail"] = self.tail
        out, selection = vsa.attention(**tensors, topk=self.topk, return_selection=True, **options)
        return out + vsa.attention(**tensors, topk=None, selection=selection, **options)

    def step(self) -> list[Tensor]:
        """Output and all gradients."""
        out = self.forward(**self.leaves)
        return [out, *torch.autograd.grad(out, list(self.leaves.values()), self.upstream)]


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("topk", BUDGETS)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_no_graph_breaks(
    gradients: bool, topk: TopK, gates: tuple[str, ...], machine: Machine
) -> None:
    layer = Layer(*machine, topk, gates)
    with torch.set_grad_enabled(gradients):
        found = torch._dynamo.explain(layer.forward)(**layer.leaves)
    assert found.graph_count == 1 and found.graph_break_count == 0, found.break_reasons


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("topk", BUDGETS)
def test_nothing_waits_for_the_device(
    topk: TopK, gates: tuple[str, ...], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU by PyTorch's own check; on a CPU by the operators that would have to wait."""
    layer = Layer(*machine, topk, gates)
    if machine[1] == "cuda":
        layer.step()  # cuBLAS makes its workspace
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):  # the second time by plans
                layer.step()
                with torch.no_grad():
                    layer.forward(**layer.leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):  # the second time by plans
            layer.step()
            with torch.no_grad():
                layer.forward(**layer.leaves)
    called = {event.key for event in profile.key_averages()}
    assert called & {"vsa::select_tiles", "vsa::select_and_attend"} or topk == 1.0
    assert not called & READS


def test_a_read_would_be_counted() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.ones(3).sum().item() == 3
    assert {event.key for event in profile.key_averages()} & READS


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("topk", BUDGETS)
def test_a_step_is_captured_in_a_cuda_graph(
    topk: TopK, gates: tuple[str, ...], machine: Machine
) -> None:
    if machine[1] == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    # Gradients of leaves are ordered after the stream in which the leaves were first used.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer = Layer(*machine, topk, gates)

        def run() -> list[Tensor]:
            with torch.no_grad():
                inference = layer.forward(**layer.leaves)
            return [inference, *layer.step()]

        expected = [x.clone() for x in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    for x in found:
        x.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
