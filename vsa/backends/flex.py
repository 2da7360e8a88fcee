# SPDX-License-Identifier: Apache-2.0
"""The fine stage through PyTorch's FlexAttention, for CUDA GPUs without kernels of their own.

FlexAttention's blocks are runs of 64 tokens, so tokens are copied into tile order with every tile
padded to 64 slots, and the text into tiles of its own that every query keeps. Compiled, the cost is
sparse; eager (on a CPU) it is dense.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vsa.backends import torch_tail
from vsa.backends.base import Backend, Request
from vsa.backends.tiles import real_tokens, slot_tokens
from vsa.values import bitmap
from vsa.values.grid import SLOTS
from vsa.values.problem import FineProblem, Problem, TailMeans

KERNEL_BLOCKS = dict.fromkeys(
    ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), SLOTS
)
"""Blocks of the kernels, which must divide those of the mask; the defaults do not."""


class FlexBackend(Backend):
    """FlexAttention, which autograd follows by itself."""

    composed = frozenset({"forward"})

    def why_not(self, request: Request) -> str | None:
        """A type, head_dim or device that FlexAttention does not support."""
        if request.device not in ("cuda", "cpu"):
            return f"FlexAttention is not supported here on {request.device} devices"
        if request.precision != "native":
            return f"FlexAttention does not compute precision={request.precision!r}"
        if request.device == "cpu":
            return "FlexAttention has no gradients on a CPU" if request.gradients else None
        if find_spec("triton") is None:
            return "FlexAttention compiles with Triton, which is not installed"
        if request.dtype == "torch.float64":
            return "FlexAttention has no float64 on a GPU"
        if request.gradients and request.dtype in ("torch.bfloat16", "torch.float16"):
            return "FlexAttention's 16-bit backward has no kernel for blocks of 64 tokens"
        if request.head_dim is not None and request.head_dim < 16:
            return f"FlexAttention needs a head_dim of at least 16 on a GPU, not {request.head_dim}"
        return None

    def forward(self, problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return attend(problem)

    def tail_forward(self, problem: Problem, means: TailMeans, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.tail_forward``: the tail by PyTorch's operators, added by log-sum-exps."""
        return torch_tail.composed(problem, means, *self.forward(problem, most))


def attend(problem: FineProblem) -> tuple[Tensor, Tensor]:
    """The fine stage, differentiable through FlexAttention itself.

    Returns:
        out (B, S_q, heads, head_dim) and lse (B, heads, S_q) fp32.
    """
    q, k, v = problem.q, problem.k, problem.v
    grid, kv_grid = problem.grids
    token, key_token = (slot_tokens(g, SLOTS, q.device) for g in (grid, kv_grid))
    real, key_real = real_tokens(problem)
    key_valid = functional.pad(key_real, (0, 1))[:, key_token.flatten()]
    out, aux = _flex(q.device)(
        _to_slots(q, real, token),
        _to_slots(k, key_real, key_token),
        _to_slots(v, key_real, key_token),
        block_mask=block_mask(
            bitmap.unpack(problem.bitmap, kv_grid.num_tiles), key_valid, len(token), len(key_token)
        ),
        scale=problem.scale,
        enable_gqa=k.shape[2] != q.shape[2],
        return_aux=AuxRequest(lse=True),
        kernel_options=KERNEL_BLOCKS,
    )
    slot = torch.arange(token.numel(), device=q.device).view_as(token)
    slot_of_token = slot.new_empty(grid.length + 1).index_put_((token,), slot)[:-1]
    out = out[:, :, slot_of_token].transpose(1, 2).masked_fill(~real[:, :, None, None], 0)
    return out, aux.lse[:, :, slot_of_token].masked_fill(~real[:, None], float("-inf"))


def block_mask(chosen: Tensor, key_valid: Tensor, query_blocks: int, key_blocks: int) -> BlockMask:
    """The selection as FlexAttention's blocks.

    Blocks of text are kept in every row and keep every column.

    Args:
        chosen: (B, heads, n_q, n_k) bool.
        key_valid: (B or 1, key_blocks * 64) bool, which slots hold a real token.
        query_blocks: blocks of queries, the text's after the video's.
        key_blocks: likewise of keys.
    """
    batch, heads, n_q, n_k = chosen.shape
    kept = chosen.new_ones(batch, heads, query_blocks, key_blocks)
    kept[:, :, :n_q, :n_k] = chosen
    whole = key_valid.unflatten(1, (key_blocks, SLOTS)).all(-1)[:, None, None]

    # Compiled, only the first list of blocks looks at this; eager looks at nothing else.
    def attends(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[b, h, query // SLOTS, key // SLOTS] & key_valid[b % len(key_valid), key]

    return BlockMask.from_kv_blocks(
        *_lists(kept & ~whole),
        *_lists(kept & whole),
        BLOCK_SIZE=(SLOTS, SLOTS),
        mask_mod=attends,
        seq_lengths=(query_blocks * SLOTS, key_blocks * SLOTS),
    )


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (..., rows) and ascending columns (..., rows, columns) of kept blocks, int32."""
    columns = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), columns.to(torch.int32)


def _to_slots(x: Tensor, real: Tensor, token: Tensor) -> Tensor:
    """(B, S, heads, D) -> (B, heads, slots, D), zeros where there is no real token."""
    padded = functional.pad(x.masked_fill(~real[:, :, None, None], 0), (0, 0, 0, 0, 0, 1))
    return padded[:, token.flatten()].transpose(1, 2)


def _flex(device: torch.device):
    """FlexAttention as it is inside a compiled region or on a CPU, otherwise compiled by itself."""
    if torch.compiler.is_compiling() or device.type == "cpu":
        return flex_attention
    return _compiled()


@lru_cache(maxsize=1)
def _compiled():
    # fullgraph: past the limit of recompilations it must not go on eagerly, which is dense.
    return torch.compile(flex_attention, fullgraph=True)
