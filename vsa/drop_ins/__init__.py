# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for those who call FastVideo's kernels: its functions over padded tiles, by our own."""

from vsa.drop_ins.block_sparse import block_sparse_attn, block_sparse_attn_from_indices
from vsa.drop_ins.video_sparse import video_sparse_attn

__all__ = ["block_sparse_attn", "block_sparse_attn_from_indices", "video_sparse_attn"]
