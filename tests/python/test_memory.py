# SPDX-License-Identifier: Apache-2.0
"""What the kernels' path holds beyond what it is given and what it returns."""

from __future__ import annotations

import pytest
import torch

import vsa
from vsa.measure.timing import peak_memory

Machine = tuple[str, str]
MOST = 0.15
"""Of the inputs: q, k, v and the gates."""


@pytest.fixture
def layer(machine: Machine):
    """A call with so many gates, its inputs and an upstream gradient."""
    backend, device = machine
    size = 12, 16, 16, 2, 64

    def make(gates: int, gradients: bool):
        leaves = torch.randn(3 + gates, 1, *size, device=device).bfloat16().unbind()
        leaves = [x.clone().requires_grad_(gradients) for x in leaves]
        named = dict(zip(("gate_coarse", "gate_fine"), leaves[3:], strict=False))
        upstream = torch.randn(1, *size, device=device).bfloat16()

        def call() -> torch.Tensor:
            return vsa.attention(*leaves[:3], 0.125, backend=backend, **named)

        call()  # libraries make their workspaces
        return call, leaves, upstream

    return make


@pytest.mark.parametrize("gates", [0, 1, 2], ids=["no-gates", "coarse", "both"])
def test_inference_holds_little_beyond_its_output(gates: int, layer) -> None:
    call, inputs, _ = layer(gates, gradients=False)
    call()  # libraries take their workspaces at the first call
    out, peak = peak_memory(call, inputs[0].device)
    assert peak >= out.nbytes
    assert peak - out.nbytes < MOST * sum(x.nbytes for x in inputs)


@pytest.mark.parametrize("gates", [0, 1, 2], ids=["no-gates", "coarse", "both"])
def test_training_saves_the_fine_output_and_little_else(gates: int, layer) -> None:
    call, inputs, upstream = layer(gates, gradients=True)
    torch.autograd.grad(call(), inputs, upstream)
    out, peak = peak_memory(call, inputs[0].device)
    saved = out.nbytes if gates else 0  # before its gate, for the gradients of gate and queries
    assert peak - out.nbytes - saved < MOST * sum(x.nbytes for x in inputs)
    grads, peak = peak_memory(lambda: torch.autograd.grad(out, inputs, upstream), inputs[0].device)
    in_fp32 = 2 * inputs[0].nbytes  # of dq, which one pass adds up
    assert peak - sum(x.nbytes for x in grads) - in_fp32 < MOST * sum(x.nbytes for x in inputs)
