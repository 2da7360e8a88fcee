# SPDX-License-Identifier: Apache-2.0
"""Ring attention, which Video Sparse Attention cannot use, and why."""

from __future__ import annotations

from typing import NoReturn


def ring_attention(*args: object, **kwargs: object) -> NoReturn:
    """Refused: it would silently compute something else.

    A step of ring attention sees the keys of one shard, but the top-k is over the means of all
    tiles of the video; a top-k per shard keeps other tiles, and as many from every shard.

    Raises:
        NotImplementedError: always, with what to use instead.
    """
    raise NotImplementedError(
        "ring_attention cannot be exact: the top-k is over all key tiles, and a ring step sees one "
        "shard of them; use vsa.distributed.ulysses_attention, with a 2-D mesh for more ranks than "
        "heads"
    )
