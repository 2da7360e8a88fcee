# SPDX-License-Identifier: Apache-2.0
"""Products of fp32 matrices on tensor cores: as exact as in fp32, for all sizes and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import machine_of, on_both
from torch import Tensor

from vsa.backends import torch_coarse
from vsa.backends.kernels.coarse_calls import (
    product,
    products_call,
    score_gradient_call,
    softmax_call,
)
from vsa.backends.kernels.coarse_select import multiply
from vsa.backends.kernels.machine import Emulator

_C = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

VALUES = {
    "normal": lambda *shape: torch.randn(shape),
    "one sign": lambda *shape: torch.rand(shape) + 1,
    "spread": lambda *shape: torch.randn(shape) * torch.randn(shape).mul(4).exp(),
    "large": lambda *shape: torch.randn(shape) * 1e15,
    "small": lambda *shape: torch.randn(shape) * 1e-12,
}


def errors(found: Tensor, true: Tensor, size: Tensor) -> Tensor:
    """As shares of what a product would be without cancellation."""
    return (found.cpu().double() - true).abs() / size


@on_both
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("depth", [1, 7, 64, 128, 1000])
def test_as_exact_as_in_fp32(kind: str, depth: int, machine: str) -> None:
    left, right = VALUES[kind](3, 70, depth), VALUES[kind](3, 90, depth)
    on_device = left.to(machine), right.to(machine), 0.3
    true = 0.3 * left.double() @ right.double().mT
    size = 0.3 * left.double().abs() @ right.double().abs().mT
    found = errors(multiply(machine_of(machine), *on_device), true, size)
    in_fp32 = errors(torch_coarse.product(*on_device), true, size)
    assert found.max() < 2e-6
    assert found.square().mean().sqrt() < 2 * in_fp32.square().mean().sqrt() + 1e-7


@on_both
def test_integers_that_fp32_holds_make_exact_products(machine: str) -> None:
    left = torch.randint(-(2**11), 2**11, (2, 40, 3)).float()
    right = torch.randint(-(2**10), 2**10, (2, 50, 3)).float()
    found = multiply(machine_of(machine), left.to(machine), right.to(machine), 0.5)
    assert torch.equal(found.cpu(), 0.5 * left @ right.mT)


LAYOUTS = ["contiguous", "transposed", "padded", "every other", "odd address", "expanded"]


def laid_out(x: Tensor, layout: str, around: float) -> Tensor:
    """The numbers of a tensor (matrices, rows, columns) in memory that holds others too."""
    matrices, rows, columns = x.shape
    whole = x.new_full((matrices + 1, 2 * rows + 3, 2 * columns + 3), around)
    if layout == "contiguous":
        part = x.new_full((x.numel() + 8,), around)[: x.numel()].view(x.shape)
    elif layout == "transposed":
        part = whole.mT.contiguous().mT[:matrices, :rows, :columns]
    elif layout == "padded":
        part = whole[:matrices, 2 : 2 + rows, 2 : 2 + columns]
    elif layout == "every other":
        part = whole[1:, : 2 * rows : 2, 1 : 1 + 2 * columns : 2]
    else:
        part = x.new_full((x.numel() + 8,), around)[1 : 1 + x.numel()].view(x.shape)
    part.copy_(x)
    return part[:1].expand(x.shape) if layout == "expanded" else part


@st.composite
def cases(draw):
    """Operands with layouts, and where the result lies."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = st.integers(1, 130) | st.sampled_from([63, 64, 65, 128])
    matrices, (rows, columns, depth) = draw(st.integers(1, 3)), draw(st.tuples(size, size, size))
    left, right = torch.randn(matrices, rows, depth), torch.randn(matrices, columns, depth)
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    return left, right, layouts, draw(st.sampled_from(LAYOUTS[:5])), draw(st.booleans())


@on_both
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_all_sizes_and_strides(case, machine: str) -> None:
    """What lies around the operands is NaN, and what lies around the result stays."""
    left, right = (
        laid_out(x.to(machine), layout, float("nan"))
        for x, layout in zip(case[:2], case[2], strict=True)
    )
    before = torch.randn(left.shape[0], left.shape[1], right.shape[1], device=machine)
    out = laid_out(before, case[3], 7.0)
    memory = out.untyped_storage()
    around = torch.empty(0, device=machine).set_(memory).clone()
    call = products_call(product(left, right, out, -0.3, case[4]))
    machine_of(machine).run(call, out.device)
    true = -0.3 * left.double() @ right.double().mT + case[4] * before.double()
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
    out.copy_(before)
    assert torch.equal(around, torch.empty(0, device=machine).set_(memory))


@on_both
def test_three_products_of_their_own_shapes_in_one_launch(machine: str) -> None:
    shapes = [(2, 70, 64, 130), (3, 1, 5, 65), (1, 129, 200, 3)]
    operands = [
        (
            torch.randn(m, rows, depth, device=machine),
            torch.randn(m, columns, depth, device=machine),
        )
        for m, rows, columns, depth in shapes
    ]
    together = [torch.empty(m, rows, columns, device=machine) for m, rows, columns, _ in shapes]
    call = products_call(
        *(product(*of, out, 0.5) for of, out in zip(operands, together, strict=True))
    )
    machine_of(machine).run(call, together[0].device)
    for (left, right), found in zip(operands, together, strict=True):
        assert torch.equal(found, multiply(machine_of(machine), left, right, 0.5))


@on_both
def test_no_number_stays_none_and_touches_no_other_row(machine: str) -> None:
    left, right = torch.randn(1, 70, 80), torch.randn(1, 90, 80)
    clean = multiply(machine_of(machine), left.to(machine), right.to(machine), 1.0).cpu()
    left[0, 3, 70], left[0, 65, 1], right[0, 64, 2] = torch.nan, torch.inf, -torch.inf
    found = multiply(machine_of(machine), left.to(machine), right.to(machine), 1.0).cpu()
    poisoned = torch.zeros(1, 70, 90, dtype=torch.bool)
    poisoned[:, [3, 65]] = poisoned[:, :, 64] = True
    assert not found[poisoned].isfinite().any()
    assert torch.equal(found[~poisoned], clean[~poisoned])


@on_both
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(70, 130, 64), (64, 64, 128), (5, 1, 16), (129, 65, 33)]
)
def test_gradients_of_scores(rows: int, columns: int, depth: int, machine: str) -> None:
    grad, coarse = torch.randn(2, 3, rows, depth, device=machine).unbind()
    values = torch.randn(3, columns, depth, device=machine)
    weights = torch.randn(3, rows, columns, device=machine).softmax(-1)
    out = torch.empty_like(weights)
    machine_of(machine).run(score_gradient_call(grad, coarse, values, weights, out), out.device)
    grad, coarse, values, weights = (x.double() for x in (grad, coarse, values, weights))
    true = weights * (grad @ values.mT - (grad * coarse).sum(-1, keepdim=True))
    torch.testing.assert_close(out.double(), true, rtol=2e-5, atol=2e-6)


@on_both
@pytest.mark.parametrize("columns", [1, 31, 128, 129, 1000])
def test_the_softmax_in_place(columns: int, machine: str) -> None:
    scores = torch.randn(2, 7, columns) * 5
    scores[0, 1] -= 1000
    found = scores.to(machine, copy=True)
    machine_of(machine).run(softmax_call(found), found.device)
    torch.testing.assert_close(
        found.cpu().double(), scores.double().softmax(-1), rtol=1e-5, atol=3e-7
    )


@pytest.mark.parametrize("seed", range(9))
def test_schedules_of_the_emulator_agree(seed: int) -> None:
    left, right = torch.randn(2, 100, 200), torch.randn(2, 70, 200)
    found = multiply(Emulator(seed=seed), left, right, 1.0)
    assert torch.equal(found, multiply(Emulator(), left, right, 1.0))


def test_what_no_launch_holds_is_refused() -> None:
    x = torch.randn(1, 4, 4)
    one = product(x, x, torch.empty(1, 4, 4))
    for count in (0, 4):
        with pytest.raises(RuntimeError, match="one to three products"):
            products_call(*[one] * count).emulate(1, 0)
    with pytest.raises(ValueError, match="Product: left must not be a null address"):
        product(x[..., :0], x[..., :0], torch.empty(1, 4, 4))
