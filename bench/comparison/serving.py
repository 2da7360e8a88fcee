# SPDX-License-Identifier: Apache-2.0
"""Kernels that servers of video models call: SGLang's for VSA-H3, and SpargeAttention's."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vsa
from comparison.archives import Unavailable, unpacked
from comparison.kernel import Kernel
from comparison.lists import ascending_lists, in_pairs
from comparison.problem import Inputs, Problem
from comparison.sparse import Ours, OursInFp8, OursInInt8

KEY_BLOCK = 128
"""Keys of a block of SpargeAttention on Hopper; it has 64 queries."""

V_RANGE = 2.25
"""Largest value in fp8, as SpargeAttention and SGLang call it."""


def module_of(file: Path) -> ModuleType:
    """A module by its file, without the package around it."""
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class SglangH3(Kernel):
    """SGLang's Triton kernel for lists of VSA-H3, 64 x 64 with TMA on Hopper; no log-sum-exp."""

    title = "SGLang, VSA-H3 in Triton"
    order = "tiles"
    gpu_only = True
    archives = ("sglang",)

    def load(self, folders: Sequence[Path]) -> None:
        backends = unpacked("sglang", folders) / "sglang/multimodal_gen/runtime/layers/attention"
        self.module = module_of(backends / "backends" / "vsa_h3_kernels.py")

    def plan(self, problem: Problem) -> None:
        self.lists, self.sizes = ascending_lists(problem.selection.mask()), problem.tile_sizes

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        given = x.q, x.k, x.v, *self.lists, self.sizes
        return self.module.vsa_h3_block_sparse_attn_forward(*given), None, None

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise Unavailable("it has a forward alone")


class InPairs(Kernel):
    """On a pattern of whole pairs of key tiles, made of the case's own."""

    def plan(self, problem: Problem) -> None:
        if problem.grid.num_tiles % 2:
            raise Unavailable(f"{problem.grid.num_tiles} tiles are no whole number of pairs")
        mask = in_pairs(problem.selection.mask())
        problem.selection = vsa.Selection.from_mask(mask, problem.grid)
        problem.topk = int(mask.sum(-1).max())
        super().plan(problem)

    def pattern(self, kind: str) -> str:
        return f"{kind}, in pairs"


class OursInPairs(InPairs, Ours):
    """Ours on it, in the inputs' type."""

    title = "vsa, pairs"


class OursInInt8InPairs(InPairs, OursInInt8):
    """Likewise in int8."""

    title = "vsa, int8, pairs"


class OursInFp8InPairs(InPairs, OursInFp8):
    """Likewise in fp8."""

    title = "vsa, fp8, pairs"


class _SpargeAttention(Kernel):
    """What runs the kernel, on a pattern of pairs."""

    title = "SpargeAttention, int8 and fp8"
    order = "tiles"
    gpu_only = True
    precision = "fp8"
    archives = "einops", "sparge"

    def load(self, folders: Sequence[Path]) -> None:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        sys.path[:0] = [str(unpacked("einops", folders))]
        folder = unpacked("sparge", folders)
        self.quantising = module_of(folder / "spas_sage_attn" / "utils.py")
        sys.path[:0] = [str(folder)]
        eager = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)  # instances that are not called were not compiled
        try:
            self.compiled = importlib.import_module("sparge_sm90")
        finally:
            sys.setdlopenflags(eager)

    def plan(self, problem: Problem) -> None:
        if not bool((problem.tile_sizes == problem.tile_sizes[0]).all()):
            raise Unavailable("it needs whole tiles, but some are clipped on this grid")
        self.scale = problem.scale
        pairs = problem.selection.mask()[..., ::2].contiguous()
        self.lists = self.quantising.block_map_lut_triton(pairs)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        """In the steps that SGLang calls it with: every block of the list, none left out."""
        q, q_scale, k, k_scale = self.quantising.get_vanilla_qk_quant(
            x.q, x.k, x.k.mean(-2, keepdim=True), KEY_BLOCK // 2, KEY_BLOCK
        )
        turned = torch.empty_like(x.v.mT, memory_format=torch.contiguous_format)
        self.compiled.transpose_pad_permute(x.v, turned, 1)
        v = torch.empty_like(turned, dtype=torch.float8_e4m3fn)
        v_scale = x.v.new_empty(v.shape[:-1], dtype=torch.float32)
        self.compiled.scale_fuse_quant(turned, v, v_scale, x.v.shape[2], V_RANGE, 1)
        out = torch.empty_like(x.q)
        self.compiled.attention(
            q, k, v, out, *self.lists, q_scale, k_scale, v_scale, 1, 0, 1, self.scale
        )
        return out, None, None

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise Unavailable("it has a forward alone")


class SpargeAttention(InPairs, _SpargeAttention):
    """SpargeAttention's kernel for Hopper: Q and K in int8, V and probabilities in fp8.

    Its key blocks have 128 tokens, so that it runs on patterns of pairs of tiles. It quantises q,
    k and v in every call, and returns no log-sum-exp.
    """
