# SPDX-License-Identifier: Apache-2.0
"""The fine stage and combine as one operator, by the project's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends.torch_combine import combine
from vsa.verify import parity
from vsa.verify.parity import by_name

Machine = tuple[str, str]

GATES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "full": lambda shape: torch.randn(shape).bfloat16(),
    "fp32": lambda shape: torch.randn(shape),
    "per-head": lambda shape: torch.randn(shape[-2], 1).bfloat16(),
    "per-frame": lambda shape: torch.randn(shape[0], shape[1], 1, 1, *shape[-2:]).bfloat16(),
    "channels-outside": lambda shape: torch.randn(shape[-1], *shape[:-1]).bfloat16().movedim(0, -1),
    "number": lambda shape: torch.randn(()),
}


@pytest.mark.parametrize("which", [("gate_fine",), ("gate_coarse",), ("gate_fine", "gate_coarse")])
@pytest.mark.parametrize("kind", GATES)
def test_gradients_of_gates_and_of_the_coarse_output(
    kind: str, which: tuple[str, ...], machine: Machine
) -> None:
    backend, device = machine
    shape = (2, 5, 6, 7, 4, 64)
    tensors = {"q": torch.randn(shape), "k": torch.randn(shape)[..., :2, :]}
    tensors["v"] = torch.randn(shape)[..., :2, :]
    tensors = {name: x.bfloat16() for name, x in tensors.items()}
    tensors |= {name: GATES[kind](shape) for name in which}
    upstream = torch.randn(shape).bfloat16()
    results = {}
    for name, place, dtype in ((backend, device, None), ("torch", "cpu", torch.float64)):
        leaves = {n: x.to(place, dtype).detach().requires_grad_() for n, x in tensors.items()}
        out = vsa.attention(**leaves, topk=3, backend=name)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
        results[name] = [out, *grads]
        assert all(x.dtype == leaf.dtype for x, leaf in zip(grads, leaves.values(), strict=True))
    for found, true in zip(results[backend], results["torch"], strict=True):
        assert found.shape == true.shape
        assert parity.error(found.detach().cpu(), true.detach()) < 0.01


def test_text_gets_no_coarse_output_and_its_gates_the_right_gradient(machine: Machine) -> None:
    backend, device = machine
    grid = vsa.Grid((4, 5, 6), prefix=3, suffix=70)
    valid = torch.rand(2, 73) < 0.6
    tensors = dict(zip(("q", "k", "v"), torch.randn(3, 2, grid.length, 2, 128).half(), strict=True))
    for name in ("gate_fine", "gate_coarse"):
        tensors[name] = torch.randn(2, grid.length, 2, 128).half()
    upstream = torch.randn(2, grid.length, 2, 128).half()
    results = {}
    for name, place, dtype in ((backend, device, None), ("torch", "cpu", torch.float64)):
        leaves = {n: x.to(place, dtype).detach().requires_grad_() for n, x in tensors.items()}
        out = vsa.attention(**leaves, topk=2, grid=grid, text_valid=valid.to(place), backend=name)
        results[name] = [out, *torch.autograd.grad(out, list(leaves.values()), upstream.to(out))]
    text = grid.tile_of_token().new_ones(grid.length, dtype=torch.bool)
    text[3 : 3 + grid.tokens] = False
    for found, true in zip(results[backend], results["torch"], strict=True):
        assert parity.error(found.detach().cpu(), true.detach()) < 0.003
    assert results[backend][-1][:, text].abs().max() == 0


def test_the_output_is_combine_of_the_fine_output(machine: Machine) -> None:
    """Of the part that is kept, but for its rounding: the output is rounded once."""
    backend, device = machine
    q, k, v, gate_fine, gate_coarse = torch.randn(5, 1, 5, 6, 7, 2, 64, device=device).bfloat16()
    grid = vsa.Grid((5, 6, 7))
    with torch.no_grad():
        fine, selection = vsa.attention(q, k, v, 3, return_selection=True, backend=backend)
        means = list(torch.randn(3, 1, 2, grid.num_tiles, 64, device=device))
        flat = [x.flatten(1, 3) for x in (q, k, v)]
        gates = [x.flatten(1, 3) for x in (gate_fine, gate_coarse)]
        coarse = torch.ops.vsa.coarse_attention(*means, 64**-0.5, backend)
        found, _, again = torch.ops.vsa.gated_attention(
            *flat, selection.bitmap, None, grid.as_ints(), grid.as_ints(), 64**-0.5, backend,
            [], None, *means, *gates, coarse,
        )  # fmt: skip
        expected = combine(fine, coarse, gate_fine, gate_coarse, grid)
        exact = [x.double().cpu() for x in (q, k, v, coarse, gate_fine, gate_coarse)]
        part = vsa.block_sparse_attention(*exact[:3], selection.to("cpu"), backend="torch")
        true = combine(part, *exact[3:], grid)
    assert torch.equal(again.view(fine.shape), fine)
    found = found.view(fine.shape)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-7)
    once, twice = (parity.error(x.double().cpu(), true) for x in (found, expected))
    assert once < twice < 0.004


@pytest.mark.parametrize("name", ["grouped-query", "other-keys", "tiny-tile", "text"])
@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
def test_gradients_through_the_means_are_rounded_once(
    name: str, scale: float, machine: Machine
) -> None:
    """With a fine gate of zero nothing but the coarse branch reaches q, k and v."""
    backend, device = machine
    problem = replace(by_name(name), head_dim=64, dtype=torch.bfloat16, scale=scale)
    problem = replace(problem, gate_coarse=True, gate_fine=True)
    tensors = problem.inputs()
    tensors["gate_fine"].zero_()
    tensors["upstream_lse"].zero_()
    found, _ = parity.ours(problem, tensors, device, backend=backend)
    wide = {key: x.double() for key, x in tensors.items()}
    true, _ = parity.ours(replace(problem, dtype=torch.float64), wide, backend="torch")
    for key in "qkv":
        largest = true.grads[key].abs().max()
        torch.testing.assert_close(
            found.grads[key].double(), true.grads[key], rtol=2**-8, atol=float(1e-5 * largest)
        )


def test_opcheck(machine: Machine) -> None:
    backend, device = machine
    problem = replace(by_name("text"), head_dim=64, dtype=torch.bfloat16)
    tensors = {name: x.to(device) for name, x in problem.inputs().items()}
    grid = problem.query_grid
    words = vsa.select(tensors["q"], tensors["k"], 2, grid=grid).bitmap
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")
    *means, coarse = torch.randn(4, 3, 2, grid.num_tiles, 64, device=device)
    plan = grid.as_ints(), grid.as_ints(), 0.1, backend, [], None
    for gates in ((None, None), (tensors["gate_fine"], tensors["gate_coarse"])):
        own_means, rows = (means, coarse) if gates[1] is not None else ([None] * 3, None)
        arguments = words, problem.valid().to(device)
        torch.library.opcheck(
            torch.ops.vsa.gated_attention,
            (q, k, v, *arguments, *plan, *own_means, *gates, rows),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
        plain = (x.detach() for x in (q, k, v))
        torch.library.opcheck(
            torch.ops.vsa.gated_attention_inference, (*plain, *arguments, *plan, *gates, rows)
        )
