# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: ours, and kernels of others that attend lists of 64-token tiles."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from comparison.archives import Unavailable, unpacked
from comparison.kernel import Kernel
from comparison.lists import ascending_lists
from comparison.problem import Inputs, Problem
from vsa.backends import BACKENDS, Request
from vsa.values import problem as arguments


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


class ThunderKittensVsa(Kernel):
    """FastVideo's VSA kernels of ThunderKittens, from the wheel fastvideo-kernel.

    Batch 1, no empty list, the scale is 1 / sqrt(head_dim). Gradients are fp32; neither their
    cast to the inputs' type nor the inversion of the lists is timed.
    """

    title = "FastVideo, ThunderKittens"
    order = "tiles"
    gpu_only = True
    archives = ("tk_vsa",)

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
