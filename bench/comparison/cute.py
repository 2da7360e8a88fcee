# SPDX-License-Identifier: Apache-2.0
"""Kernels of others that are written in the CuTe DSL, and compiled by it on first use."""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comparison.archives import Unavailable, unpacked
from comparison.kernel import Kernel
from comparison.lists import ascending_lists, head_dim_128, key_intervals, whole_tiles
from comparison.problem import Inputs, Problem
from vsa.values.grid import SLOTS


def use_cute_dsl(folders: Sequence[Path], *archives: str) -> None:
    """Let Python find the DSL, and packages in archives that need it."""
    dsl = unpacked("cutlass_dsl", folders)
    found = [unpacked(name, folders) for name in archives]
    sys.path[:0] = [str(dsl / "nvidia_cutlass_dsl" / "dsl_packages"), str(dsl), *map(str, found)]
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)


class CudnnBsa(Kernel):
    """cudnn.BSA of nvidia-cudnn-frontend.

    Its backward supports head_dim 128 alone, and inverts the lists on every call.
    """

    title = "cudnn.BSA"
    order = "tiles"
    gpu_only = True
    archives = "cutlass_dsl", "cudnn_bsa"

    def load(self, folders: Sequence[Path]) -> None:
        use_cute_dsl(folders, "cudnn_bsa")
        importlib.import_module("cudnn.block_sparse_attention._interface")  # what is missing, now
        self.module = importlib.import_module("cudnn").BSA

    def plan(self, problem: Problem) -> None:
        whole = bool((problem.tile_sizes == SLOTS).all())
        self.head_dim = problem.case.head_dim
        self.lists, count = ascending_lists(problem.selection.mask())
        self.options = {
            "block_sizes": None if whole else problem.tile_sizes,
            "q2k_block_nums": count,
            "sparse_block_size": SLOTS,
            "softmax_scale": problem.scale,
            "layout": "bhsd",
        }

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        found = self.module.block_sparse_attention_forward(
            x.q, x.k, x.v, self.lists, kv_splits=1, **self.options
        )
        out, lse = found["o_tensor"], found["lse_tensor"]
        return out, lse, (out, lse)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.head_dim != 128:
            raise Unavailable(f"its backward needs head_dim 128, but it is {self.head_dim}")
        found = self.module.block_sparse_attention_backward(
            x.upstream, x.q, x.k, x.v, *saved, self.lists, **self.options
        )
        return found["dq_tensor"], found["dk_tensor"], found["dv_tensor"]


class CudnnBsaInFp8(CudnnBsa):
    """Its fp8 forward, quantisation included: whole tiles of head_dim 128, equally many in a row.

    It returns no log-sum-exp.
    """

    title = "cudnn.BSA, fp8"
    precision = "fp8"

    def plan(self, problem: Problem) -> None:
        super().plan(problem)
        head_dim_128(problem)
        whole_tiles(problem)
        count = self.options["q2k_block_nums"]
        if not bool((count == self.lists.shape[-1]).all()):
            raise Unavailable("it needs as many key tiles in every row, but their numbers differ")
        self.scale = problem.scale

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        found = self.module.block_sparse_attention_fp8_forward(
            x.q, x.k, x.v, self.lists, self.lists.shape[-1], softmax_scale=self.scale,
            sparse_block_size=SLOTS,
        )  # fmt: skip
        return found["o_tensor"], None, None

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise Unavailable("its fp8 kernel has a forward alone")


class CudnnFlex(Kernel):
    """cudnn.flex_attention: any mask, as intervals of keys for each query of each head.

    Its kernels compute blocks of 128 x 128 (192 x 128 for head_dim 64) in which the mask leaves
    anything, and read a bit for each pair in those that it leaves in part.
    """

    title = "cuDNN, flex_attention"
    order = "tiles"
    gpu_only = True
    archives = "cutlass_dsl", "cudnn_bsa"

    def load(self, folders: Sequence[Path]) -> None:
        use_cute_dsl(folders, "cudnn_bsa")
        self.module = importlib.import_module("cudnn.flex_attention")

    def plan(self, problem: Problem) -> None:
        self.scale = problem.scale
        heads, head_dim = problem.case.heads, problem.case.head_dim
        bounds = key_intervals(problem.selection.mask()[0], problem.tile_sizes)
        size = 1, heads, problem.grid.num_tiles * SLOTS, head_dim
        like = torch.empty(size, dtype=torch.bfloat16, device=problem.device).transpose(1, 2)
        for _ in range(2):  # the first time it compiles
            begin = time.monotonic()
            self.mask = self.module.create_mask_plan(bounds, like, like, like, build_backward=True)
            self.synchronize()
            self.plan_seconds = time.monotonic() - begin

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        leaves = [each.transpose(1, 2).detach().requires_grad_() for each in (x.q, x.k, x.v)]
        out, lse = self.module.flex_attn_func(
            *leaves, mask_plan=self.mask, softmax_scale=self.scale, return_lse=True
        )
        return out.detach().transpose(1, 2), lse.detach(), (out, leaves)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, leaves = saved
        grads = torch.autograd.grad(out, leaves, x.upstream.transpose(1, 2), retain_graph=True)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


class FlashAttention4(Kernel):
    """FlashAttention-4's block sparsity on Hopper: 64 x 64 forward, whole tiles.

    Its backward takes key blocks of 128, so that it cannot follow the same pattern.
    """

    title = "FlashAttention-4, CuTe"
    order = "tiles"
    gpu_only = True
    archives = "cutlass_dsl", "einops", "flash_attention_4"

    def load(self, folders: Sequence[Path]) -> None:
        use_cute_dsl(folders, "einops", "flash_attention_4")
        self.attend = importlib.import_module("flash_attn.cute").flash_attn_func
        self.lists_of = importlib.import_module(
            "flash_attn.cute.block_sparsity"
        ).BlockSparseTensorsTorch

    def plan(self, problem: Problem) -> None:
        whole_tiles(problem)
        self.scale = problem.scale
        columns, count = ascending_lists(problem.selection.mask())
        none = torch.zeros_like(count)  # blocks that need a mask inside them
        self.lists = self.lists_of(
            mask_block_cnt=none,
            mask_block_idx=none[..., None].contiguous(),
            full_block_cnt=count,
            full_block_idx=columns,
            block_size=(SLOTS, SLOTS),
        )

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        q, k, v = (each.transpose(1, 2) for each in (x.q, x.k, x.v))
        out, lse = self.attend(
            q, k, v, softmax_scale=self.scale, block_sparse_tensors=self.lists, return_lse=True
        )
        return out.transpose(1, 2), lse, None

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise Unavailable("its backward takes key blocks of 128 tokens, not of 64")
