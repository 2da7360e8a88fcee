# SPDX-License-Identifier: Apache-2.0
"""Self-attention inside a Wan transformer: its time, and the fastest dense kernel for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa import stages
from vsa.integrations.diffusers import processors
from vsa.measure import seconds

ATTENTION = "attention"
"""The range of self-attention proper: after projections, norms and rotation."""

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


def in_ranges(transformer: Any, call: Callable[[], object], open_range: stages.Range) -> None:
    """Run ``call`` in the range "step", and each self-attention inside of it in "attention".

    Args:
        transformer: a WanTransformer3DModel, dense or sparse.
        call: what runs it.
        open_range: opens a range by name.
    """
    inside = [False]

    def enter(*_: object) -> None:
        inside[0] = True

    def leave(*_: object) -> None:
        inside[0] = False

    def ranged(function: Callable[..., Any]) -> Callable[..., Any]:
        def call_in_range(*args: Any, **kwargs: Any) -> Any:
            if not inside[0]:  # cross-attention goes through the same function
                return function(*args, **kwargs)
            with open_range(ATTENTION):
                return function(*args, **kwargs)

        return call_in_range

    handles = []
    for block in transformer.blocks:
        layer: nn.Module = block.attn1
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    dense, sparse = transformer_wan.dispatch_attention_fn, processors.attention
    transformer_wan.dispatch_attention_fn = ranged(dense)
    processors.attention = ranged(sparse)
    try:
        with open_range("step"):
            call()
    finally:
        transformer_wan.dispatch_attention_fn, processors.attention = dense, sparse
        for handle in handles:
            handle.remove()
