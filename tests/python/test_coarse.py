# SPDX-License-Identifier: Apache-2.0
"""Coarse attention: its gradients as written out for the kernels, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vsa.backends.kernels import coarse_backward
from vsa.stages.coarse import coarse_attention


def _means(dtype: torch.dtype, heads: int, kv_heads: int, rows: int, columns: int) -> list[Tensor]:
    sizes = (heads, rows), (kv_heads, columns), (kv_heads, columns)
    return [torch.randn(2, *size, 16, dtype=dtype) for size in sizes]


def _gradients(means: list[Tensor], out: Tensor, upstream: Tensor, scale: float) -> list[Tensor]:
    grads = [torch.full_like(x, float("nan")) for x in means]
    coarse_backward.coarse_attention_backward(upstream, out, means, scale, grads)
    return grads


@pytest.mark.parametrize("slice_bytes", [1, 3000, 1 << 25], ids=["a row", "some rows", "all"])
@pytest.mark.parametrize("scale", [0.25, -0.4, 0.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_gradients_are_those_of_autograd(
    heads: int, kv_heads: int, scale: float, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse_backward, "PROBABILITY_BYTES", slice_bytes)
    means = [x.requires_grad_() for x in _means(torch.float64, heads, kv_heads, 11, 7)]
    upstream = torch.randn(2, heads, 11, 16, dtype=torch.float64)
    out = coarse_attention(means[0], means[1], means[2], scale, "torch")
    true = torch.autograd.grad(out, means, upstream)
    found = _gradients([x.detach() for x in means], out.detach(), upstream, scale)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_products_are_in_full_precision_whatever_the_process_allows() -> None:
    means, upstream = _means(torch.float32, 2, 2, 50, 400), torch.randn(2, 2, 50, 16)
    out = coarse_attention(means[0], means[1], means[2], 0.3, "torch")
    before = _gradients(means, out, upstream, 0.3)
    torch.set_float32_matmul_precision("medium")
    try:
        after = _gradients(means, out, upstream, 0.3)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
