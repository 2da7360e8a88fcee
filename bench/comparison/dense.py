# SPDX-License-Identifier: Apache-2.0
"""Dense attention of others: FlashAttention-3 and cuDNN."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from comparison.archives import unpacked
from comparison.kernel import Kernel
from comparison.problem import Inputs, Problem


class FlashAttention3(Kernel):
    """FlashAttention-3 as xformers' wheel ships it, for sm_90a."""

    title = "FlashAttention-3"
    dense = True
    gpu_only = True
    archives = ("fa3",)

    def load(self, folders: Sequence[Path]) -> None:
        """The extension was built for CUDA 12, whose runtime lies beside it."""
        folder = unpacked("fa3", folders)
        ctypes.CDLL(str(folder / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(folder / "flash_attn_3.so"))
        self.operators: Any = torch.ops.flash_attn_3

    def plan(self, problem: Problem) -> None:
        self.options = {"softmax_scale": problem.scale, "is_causal": False}

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        out, lse, *_ = self.operators.fwd(x.q, x.k, x.v, num_splits=1, **self.options)
        return out, lse, (out, lse)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v)
        fixed = {"deterministic": False, **self.options}
        self.operators.bwd(x.upstream, x.q, x.k, x.v, *saved, *grads, **fixed)
        return grads


class CudnnDense(Kernel):
    """cuDNN's attention through PyTorch; heads come first in the views that it is given."""

    title = "cuDNN, dense"
    dense = True
    gpu_only = True

    def load(self, folders: Sequence[Path]) -> None:
        """PyTorch has it."""

    def plan(self, problem: Problem) -> None:
        self.scale = problem.scale

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        leaves = [each.transpose(1, 2).detach().requires_grad_() for each in (x.q, x.k, x.v)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = leaves
            out = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.detach().transpose(1, 2), None, (out, leaves)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, leaves = saved
        grads = torch.autograd.grad(out, leaves, x.upstream.transpose(1, 2), retain_graph=True)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv
