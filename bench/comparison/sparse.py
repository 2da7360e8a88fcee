# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: ours, and kernels of others that attend lists of 64-token tiles."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from comparison.archives import Unavailable, unpacked
from comparison.kernel import Kernel
from comparison.problem import Inputs, Problem
from vsa.backends import BACKENDS, Request
from vsa.values import problem as arguments
from vsa.values.grid import SLOTS


class Ours(Kernel):
    """This project's kernels: on a Hopper GPU, or their source through the emulator on a CPU."""

    title = "vsa"

    def load(self, folders: Sequence[Path]) -> None:
        self.backend = "hopper" if self.device.type == "cuda" else "emulated"
        why_not = BACKENDS[self.backend].why_not(Request(self.device.type, self.device.index))
        if why_not is not None:
            raise Unavailable(why_not)

    def plan(self, problem: Problem) -> None:
        grid, chosen = problem.grid.as_ints(), problem.selection
        self.options = chosen.bitmap, None, grid, grid, problem.scale, self.backend
        self.topk = problem.topk

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        asked = arguments.Problem(x.q, x.k, x.v, *self.options)
        out, lse = torch.ops.vsa.block_sparse_attention(*asked, self.topk)
        return out, lse, (out, lse)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked = arguments.Problem(x.q, x.k, x.v, *self.options)
        given = x.upstream, None, *saved, *asked, self.topk
        return torch.ops.vsa.block_sparse_attention_backward(*given)


class OursInInt8(Ours):
    """The same in low precision; keys and values are quantised in every call."""

    title = "vsa, int8"
    precision = "int8"

    def load(self, folders: Sequence[Path]) -> None:
        super().load(folders)
        request = Request(self.device.type, self.device.index, precision=self.precision)
        if (why_not := BACKENDS[self.backend].why_not(request)) is not None:
            raise Unavailable(why_not)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        asked = arguments.Problem(x.q, x.k, x.v, *self.options)
        out, lse = torch.ops.vsa.low_precision_attention(*asked, self.precision, self.topk)
        return out, lse, None

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise Unavailable(f"{self.precision} is for inference")


class OursInFp8(OursInInt8):
    """Likewise."""

    title = "vsa, fp8"
    precision = "fp8"


class WholeAttention(Kernel):
    """``vsa.attention`` as users call it: means, scores, choice of tiles and fine stage, no gates.

    It chooses its own tiles, for each set of inputs anew; backward is autograd's.
    """

    title = "vsa.attention, whole"
    own_pattern = True

    def load(self, folders: Sequence[Path]) -> None:
        self.backend = Ours(self.device, folders).backend

    def plan(self, problem: Problem) -> None:
        self.grid, self.topk = problem.grid, problem.topk
        first = problem.sets[0]
        problem.selection = vsa.select(first.q, first.k, problem.topk, grid=problem.grid)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        leaves = [each.detach().requires_grad_() for each in (x.q, x.k, x.v)]
        q, k, v = leaves
        out = vsa.attention(q, k, v, self.topk, grid=self.grid, backend=self.backend)
        return out.detach(), None, (out, leaves)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, leaves = saved
        return torch.autograd.grad(out, leaves, x.upstream, retain_graph=True)


def ascending_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (B, heads, rows, columns) as lists.

    Returns:
        columns of every row, (B, heads, rows, longest) int32, ascending, zeros behind the last;
        how many there are, (B, heads, rows) int32.
    """
    count = mask.sum(-1, dtype=torch.int32)
    longest = int(count.max())
    columns = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
    behind = torch.arange(longest, device=mask.device) >= count[..., None]
    return columns.masked_fill(behind, 0).int().contiguous(), count.contiguous()


class ThunderKittensVsa(Kernel):
    """FastVideo's VSA kernels of ThunderKittens, from the wheel fastvideo-kernel.

    Batch 1, no empty list, the scale is 1 / sqrt(head_dim). Gradients are fp32; neither their
    cast to the inputs' type nor the inversion of the lists is timed.
    """

    title = "FastVideo, ThunderKittens"
    order = "tiles"
    gpu_only = True

    def load(self, folders: Sequence[Path]) -> None:
        folder = unpacked("tk_vsa", folders)
        (extension,) = (folder / "fastvideo_kernel" / "_C").glob("fastvideo_kernel_ops*.so")
        link_driver(extension, folder / "fastvideo_kernel.libs")
        found = importlib.util.spec_from_file_location("fastvideo_kernel_ops", extension)
        assert found is not None and found.loader is not None
        self.module = importlib.util.module_from_spec(found)
        found.loader.exec_module(self.module)

    def plan(self, problem: Problem) -> None:
        mask = problem.selection.mask()
        self.scale, self.sizes = problem.scale, problem.tile_sizes
        self.keys, self.queries = ascending_lists(mask), ascending_lists(mask.mT)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        out, aux = self.module.block_sparse_fwd(x.q, x.k, x.v, *self.keys, self.sizes)
        return out, aux[..., 0] * -self.scale, (out, aux)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = x.q, x.k, x.v, *saved, x.upstream, *self.queries, self.sizes
        dq, dk, dv = self.module.block_sparse_bwd(*given)
        return dq, dk, dv


def link_driver(extension: Path, libraries: Path) -> None:
    """Put this machine's driver where an extension looks for the copy that its wheel had."""
    torch.cuda.init()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    driver = next(line.split()[-1] for line in mapped if "libcuda.so" in line)
    for name in set(re.findall(rb"libcuda-[0-9a-f]+\.so[.0-9]*", extension.read_bytes())):
        link = libraries / name.decode()
        link.unlink(missing_ok=True)
        link.symlink_to(driver)


class CudnnBsa(Kernel):
    """cudnn.BSA of nvidia-cudnn-frontend, written in the CuTe DSL; compiled on first use.

    Its backward supports head_dim 128 alone, and inverts the lists on every call.
    """

    title = "cudnn.BSA"
    order = "tiles"
    gpu_only = True

    def load(self, folders: Sequence[Path]) -> None:
        folder = unpacked("cudnn_bsa", folders)
        sys.path[:0] = [str(folder / "nvidia_cutlass_dsl" / "dsl_packages"), str(folder)]
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
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
        if self.head_dim != 128:
            raise Unavailable(f"it needs head_dim 128, but it is {self.head_dim}")
        if self.options["block_sizes"] is not None:
            raise Unavailable("it needs whole tiles, but some are clipped on this grid")
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
