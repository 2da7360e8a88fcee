# SPDX-License-Identifier: Apache-2.0
"""Coarse attention: its gradients as the kernels write them out, against autograd."""

from __future__ import annotations

import pytest
import torch
from kernels.machines import machine_of, on_both
from torch import Tensor

from vsa.backends.kernels import coarse_backward
from vsa.stages.coarse import coarse_attention

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


def _gradients(
    machine: str, means: list[Tensor], out: Tensor, upstream: Tensor, scale: float
) -> list[Tensor]:
    grads = [torch.full_like(x, float("nan")) for x in means]
    coarse_backward.coarse_attention_backward(
        machine_of(machine), upstream, out, means, scale, grads
    )
    return grads


@on_both
@pytest.mark.parametrize("slice_bytes", [1, 3000, 1 << 25], ids=["a row", "some rows", "all"])
@pytest.mark.parametrize("scale", [0.25, -0.4, 0.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_gradients_are_those_of_autograd(
    heads: int,
    kv_heads: int,
    scale: float,
    slice_bytes: int,
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coarse_backward, "PROBABILITY_BYTES", slice_bytes)
    # As many rows as a slice of one row makes launches for in a moment.
    rows, columns = (11, 7) if slice_bytes == 1 else (70, 65)
    sizes = (heads, rows), (kv_heads, columns), (kv_heads, columns)
    means = [torch.randn(2, *size, 16, device=machine) for size in sizes]
    upstream = torch.randn(2, heads, rows, 16, device=machine)
    exact = [x.double().requires_grad_() for x in means]
    out = coarse_attention(exact[0], exact[1], exact[2], scale, "torch")
    true = torch.autograd.grad(out, exact, upstream.double())
    found = _gradients(machine, means, out.detach().float(), upstream, scale)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)
    for a, b in zip(
        found, _gradients(machine, means, out.detach().float(), upstream, scale), strict=True
    ):
        assert torch.equal(a, b)
