# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention with the sequence sharded over ranks of torch.distributed."""

from vsa.distributed.ring import ring_attention
from vsa.distributed.sequence import shard_sequence
from vsa.distributed.ulysses import ulysses_attention

__all__ = ["ring_attention", "shard_sequence", "ulysses_attention"]
