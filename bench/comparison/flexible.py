# SPDX-License-Identifier: Apache-2.0
"""FlexAttention with the same mask; compiled on a GPU, which takes a minute for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from comparison.kernel import Kernel, needs_gpu
from comparison.problem import Inputs, Problem
from vsa.backends.flex import block_mask
from vsa.values.grid import SLOTS

FORWARD_BLOCKS = {"fwd_BLOCK_M": SLOTS, "fwd_BLOCK_N": SLOTS}


class FlexAttention(Kernel):
    """Triton kernels that PyTorch writes for a mask of 64-token blocks."""

    title = "FlexAttention"
    order = "tiles"

    def load(self, folders: Sequence[Path]) -> None:
        if self.device.type == "cuda":
            allow_blocks_of_64()
            torch._dynamo.config.recompile_limit = 64
            self.call: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        else:
            self.call = flex_attention

    def plan(self, problem: Problem) -> None:
        self.scale, tiles = problem.scale, problem.grid.num_tiles
        place = torch.arange(SLOTS, device=problem.device)
        valid = (place < problem.tile_sizes[:, None]).view(1, -1)
        self.mask = block_mask(problem.selection.mask(), valid, tiles, tiles)

    def forward(self, x: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        compiled = self.device.type == "cuda"  # its eager form on a CPU has no backward
        leaves = [each.detach().requires_grad_(compiled) for each in (x.q, x.k, x.v)]
        with torch.enable_grad():  # without, it would be compiled once more
            out, aux = self.call(
                *leaves,
                block_mask=self.mask,
                scale=self.scale,
                return_aux=AuxRequest(lse=True),
                kernel_options=FORWARD_BLOCKS if compiled else None,
            )
        return out.detach(), aux.lse.detach(), (out, leaves)

    def backward(self, x: Inputs, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, leaves = saved
        needs_gpu(self.device)
        return torch.autograd.grad(out, leaves, x.upstream, retain_graph=True)


def allow_blocks_of_64() -> None:
    """Add backward configurations whose blocks divide 64.

    PyTorch's only one for Hopper and head_dim 64 or 128 has blocks of 128 keys, which a mask of
    64-token blocks rules out, so that it would find "no choices to select".
    """
    from torch._inductor.template_heuristics import triton as heuristics

    owner: Any = heuristics.CUDAConfigHeuristic
    original = owner.get_flex_attn_bwd_configs

    def with_blocks_of_64(self: Any, head_dim: int, dtype: torch.dtype) -> list[Any]:
        added = [heuristics.FlexBwDConfig(64, 64, 64, 64, stages, 4) for stages in (1, 2)]
        return [*original(self, head_dim, dtype), *added]

    owner.get_flex_attn_bwd_configs = with_blocks_of_64
