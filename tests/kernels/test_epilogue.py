# SPDX-License-Identifier: Apache-2.0
"""combine at the end of the forward kernel, where nothing needs a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vsa
from vsa.verify import dense, parity
from vsa.verify.parity import PROBLEMS, Problem, by_name

Machine = tuple[str, str]
GATED = [problem for problem in PROBLEMS if problem.gate_coarse or problem.gate_fine]


def _narrow(shape: tuple[int, ...], *more: int) -> Tensor:
    return torch.randn(*shape[:-1], shape[-1] + sum(more)).bfloat16()


GATES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "pairs": lambda shape: _narrow(shape),
    "misaligned": lambda shape: _narrow(shape, 2)[..., 1:-1],
    "odd-strides": lambda shape: _narrow(shape, 1)[..., :-1],
    "channels-outside": lambda shape: torch.randn(shape[-1], *shape[:-1]).bfloat16().movedim(0, -1),
    "fp32": lambda shape: torch.randn(shape),
    "every-other-fp32": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "per-head": lambda shape: torch.randn(shape[-2], 1).bfloat16(),
    "per-frame": lambda shape: torch.randn(shape[0], shape[1], 1, 1, *shape[-2:]).bfloat16(),
    "number": lambda shape: torch.randn(()),
}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class Operators(TorchDispatchMode):
    """The project's operators that were called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vsa":
            self.called.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def _gated_operators(called: list[str]) -> list[str]:
    return [name for name in called if name.startswith("gated_")]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("problem", GATED, ids=lambda problem: problem.name)
def test_error_is_no_larger_than_with_a_pass_of_its_own(
    problem: Problem, head_dim: int, element: torch.dtype, machine: Machine
) -> None:
    problem = replace(problem, head_dim=head_dim, dtype=element)
    tensors = problem.inputs()
    fused, selection = parity.ours(problem, tensors, machine[1], False, backend=machine[0])
    apart, _ = parity.ours(problem, tensors, machine[1], True, backend=machine[0])
    truth, _ = parity.expected(problem, tensors, selection.mask(), dense.attention)
    assert torch.equal(fused.lse, apart.lse)
    rounded = parity.error(truth.out.to(element), truth.out)
    assert parity.error(fused.out, truth.out) <= max(
        1.001 * parity.error(apart.out, truth.out), 1.2 * rounded
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("which", [("gate_fine",), ("gate_coarse",), ("gate_fine", "gate_coarse")])
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_every_kind(kind: str, which: tuple[str, ...], machine: Machine) -> None:
    backend, device = machine
    shape = (2, 5, 6, 7, 4, 64)
    q, k, v = torch.randn(3, *shape).bfloat16()
    gates = {name: GATES[kind](shape) for name in which}
    found = vsa.attention(
        *(x.to(device) for x in (q, k[..., :2, :], v[..., :2, :])), 3, backend=backend,
        **{name: gate.to(device) for name, gate in gates.items()},
    )  # fmt: skip
    true = vsa.attention(
        *(x.double() for x in (q, k[..., :2, :], v[..., :2, :])), 3, backend="torch",
        **{name: gate.double() for name, gate in gates.items()},
    )  # fmt: skip
    assert parity.error(found.cpu(), true) < 0.004


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_with_powers_of_two_are_exact(head_dim: int, machine: Machine) -> None:
    """Bit for bit what the fine stage gives, times the gate; a coarse gate of zero adds nothing."""
    backend, device = machine
    q, k, v = torch.randn(3, 1, 5, 6, 7, 2, head_dim, device=device).bfloat16()
    fine = vsa.attention(q, k, v, 3, backend=backend)
    zero = torch.zeros_like(q)
    assert torch.equal(vsa.attention(q, k, v, 3, gate_coarse=zero, backend=backend), fine)
    gate = 2.0 ** torch.randint(-3, 4, q.shape, device=device)
    for kind in (gate, gate.bfloat16()):
        both = {"gate_fine": kind, "gate_coarse": zero, "backend": backend}
        assert torch.equal(vsa.attention(q, k, v, 3, **both), (fine.float() * gate).bfloat16())


def test_text_gets_no_coarse_output_and_what_is_invalid_stays_zero(machine: Machine) -> None:
    backend, device = machine
    grid = vsa.Grid((4, 5, 6), prefix=3, suffix=70)
    q, k, v, *gates = torch.randn(5, 2, grid.length, 2, 128).half()
    valid = torch.rand(2, 73) < 0.6
    text = torch.cat((torch.arange(3), torch.arange(grid.length - 70, grid.length)))
    invalid = torch.zeros(2, grid.length, dtype=torch.bool)
    invalid[:, text] = ~valid
    named = dict(zip(("gate_fine", "gate_coarse"), gates, strict=True))
    true = vsa.attention(
        q.double(), k.double(), v.double(), 2, grid=grid, text_valid=valid, backend="torch",
        **{name: x.double() for name, x in named.items()},
    )  # fmt: skip
    named["gate_coarse"][:, text] = float("nan")
    named["gate_fine"][invalid] = float("nan")
    found = vsa.attention(
        *(x.to(device) for x in (q, k, v)), 2, grid=grid, text_valid=valid.to(device),
        backend=backend, **{name: x.to(device) for name, x in named.items()},
    ).cpu()  # fmt: skip
    assert found[invalid].abs().max() == 0 and invalid.sum() > 20
    assert parity.error(found, true) < 0.001


def test_the_fused_operator_runs_where_no_gradient_is_wanted(machine: Machine) -> None:
    backend, device = machine
    q, k, v, gate = torch.randn(4, 1, 5, 6, 7, 2, 64, device=device).bfloat16()

    def call(**options) -> tuple[Tensor, list[str]]:
        with Operators() as operators:
            out = vsa.attention(q, k, v, 3, **{"gate_coarse": gate} | options, backend=backend)
        return out, _gated_operators(operators.called)

    fused, called = call()
    assert called == ["gated_attention_inference"]
    gate.requires_grad_()
    trained, called = call()
    assert called == ["gated_attention"] and trained.requires_grad
    assert torch.equal(trained, fused)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            out, called = call()
        assert called == ["gated_attention_inference"] and torch.equal(out, fused)
    (_, lse), _ = call(return_lse=True)
    with torch.no_grad():
        (out, again), called = call(return_lse=True)
    assert called == ["gated_attention_inference"]
    assert torch.equal(out, fused) and torch.equal(again, lse)


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_regions_take_the_same_way(gradients: bool, machine: Machine) -> None:
    backend, device = machine
    tensors = torch.randn(4, 1, 5, 6, 7, 2, 64, device=device).bfloat16().unbind()
    q, k, v, gate = (x.clone().requires_grad_(gradients) for x in tensors)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(vsa.attention, fullgraph=True, backend=keep)
    found = compiled(q, k, v, 3, gate_coarse=gate, backend=backend)
    assert torch.equal(found, vsa.attention(q, k, v, 3, gate_coarse=gate, backend=backend))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    used = [name for name in targets if name.startswith("vsa.")]
    assert len(graphs) == len(used) == 1 and ("inference" in used[0]) != gradients


def test_fake_tensors_have_the_shapes_of_real_ones(machine: Machine) -> None:
    backend, device = machine
    problem = replace(by_name("text"), head_dim=64, dtype=torch.bfloat16)
    tensors = {name: x.to(device) for name, x in problem.inputs().items() if "up" not in name}
    options = {"grid": problem.query_grid, "return_lse": True, "backend": backend}
    real = vsa.attention(**tensors, topk=2, **options)
    with FakeTensorMode() as mode:
        fake = vsa.attention(
            **{name: mode.from_tensor(x) for name, x in tensors.items()}, topk=2, **options
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_the_coarse_output_is_in_full_precision_whatever_the_process_allows(
    machine: Machine,
) -> None:
    backend, device = machine
    q, k, v, gate = torch.randn(4, 1, 5, 6, 7, 2, 64, device=device).bfloat16()
    before = vsa.attention(q, k, v, 3, gate_coarse=gate, backend=backend)
    torch.set_float32_matmul_precision("medium")
    try:
        after = vsa.attention(q, k, v, 3, gate_coarse=gate, backend=backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, after)
