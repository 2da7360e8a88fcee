# SPDX-License-Identifier: Apache-2.0
"""Kernels that hosts of MiniMax-H3 call with lists or maps of padded tiles, by our drop-ins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import vsa


def from_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_index: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor,
    out: Tensor | None = None,
    use_sm100_kernel: bool = False,
) -> Tensor:
    """In place of SGLang's ``vsa_h3_block_sparse_attn_forward``.

    Args:
        q: (B, heads, slots, head_dim), and so are k and v.
        k: see q.
        v: see q.
        q2k_index: (B, heads, n_q, width) int32, key tiles of each query tile.
        q2k_num: (B, heads, n_q) int32, how many of them.
        variable_block_sizes: (n_k,), real tokens of each tile; 0 of one that makes pairs.
        out: where the result goes, like q.
        use_sm100_kernel: which of the host's kernels would have run; says nothing here.

    Returns:
        ``out``, or a new tensor like q.

    Raises:
        ValueError: an ``out`` of another shape or type, which would be filled all the same.
    """
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        raise ValueError(
            f"out must be like q, {tuple(q.shape)} {q.dtype}, but it is {tuple(out.shape)} "
            f"{out.dtype}"
        )
    result, _ = vsa.block_sparse_attn_from_indices(
        q, k, v, q2k_index, q2k_num, variable_block_sizes
    )
    return result if out is None else out.copy_(result)


def from_map_256_bshd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logical_block_map_256: Tensor,
    logical_variable_block_sizes_256: Tensor,
) -> tuple[Tensor, Tensor]:
    """In place of FastVideo's ``block_sparse_attn_256_bshd``.

    Args:
        q: (B, slots, heads, head_dim), and so are k and v.
        k: see q.
        v: see q.
        logical_block_map_256: (B, heads, n, n) or (heads, n, n) bool, tiles of 256 that are kept.
        logical_variable_block_sizes_256: (n,), real tokens of each.

    Returns:
        out, like q; and the log-sum-exp, (B, heads, slots).
    """
    kept = logical_block_map_256
    kept = kept.expand(q.shape[0], -1, -1, -1) if kept.ndim == 3 else kept
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = vsa.block_sparse_attn(q, k, v, kept, logical_variable_block_sizes_256)
    return out.transpose(1, 2), lse


def whole_bshd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = 64,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """In place of FastVideo's ``video_sparse_attn_bshd``: (B, slots, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weight = None if compress_attn_weight is None else compress_attn_weight.transpose(1, 2)
    return vsa.video_sparse_attn(
        q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size, weight
    ).transpose(1, 2)


PROVIDED: dict[str, dict[str, Any]] = {
    "fastvideo_kernel": {
        "video_sparse_attn": vsa.video_sparse_attn,
        "video_sparse_attn_bshd": whole_bshd,
        "block_sparse_attn": vsa.block_sparse_attn,
        "block_sparse_attn_from_indices": vsa.block_sparse_attn_from_indices,
    },
    "fastvideo_kernel.ops": {
        "video_sparse_attn": vsa.video_sparse_attn,
        "video_sparse_attn_bshd": whole_bshd,
    },
    "fastvideo_kernel.block_sparse_attn": {
        "block_sparse_attn": vsa.block_sparse_attn,
        "block_sparse_attn_from_indices": vsa.block_sparse_attn_from_indices,
    },
    "fastvideo_kernel.block_sparse_attn_256": {
        "block_sparse_attn_256_bshd": from_map_256_bshd,
    },
}
"""Functions of ours by the modules of fastvideo-kernel that hold theirs, and by their names."""
