# SPDX-License-Identifier: Apache-2.0
"""The fastest dense kernel for the self-attention of a Wan transformer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa.measure.timing import seconds

_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_REPEATS = 3


def dense_kernels(
    tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds that each kernel of scaled_dot_product_attention takes for one layer, fastest first.

    Kernels that do not take these inputs are left out; on a CPU there is no choice, and the answer
    is empty.
    """
    if device.type != "cuda":
        return {}
    # (1, tokens, heads, head_dim) as in a model, which hands over transposed views
    q, k, v = torch.randn(3, 1, tokens, heads, head_dim, device=device, dtype=dtype).transpose(2, 3)
    times = {}
    for name, kernel in _KERNELS.items():
        with sdpa_kernel(kernel):
            try:
                taken = seconds(
                    lambda: functional.scaled_dot_product_attention(q, k, v), device, _REPEATS
                )
            except RuntimeError:
                continue  # "No available kernel", which PyTorch explains in warnings of its own
        times[name] = statistics.median(taken)
    return dict(sorted(times.items(), key=lambda item: item[1]))


@contextmanager
def preferring(kernels: dict[str, float]) -> Iterator[None]:
    """Dense attention by the first of the kernels that takes what it is given."""
    if not kernels:
        yield
        return
    with sdpa_kernel([*(_KERNELS[name] for name in kernels), SDPBackend.MATH], set_priority=True):
        yield
