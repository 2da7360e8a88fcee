# SPDX-License-Identifier: Apache-2.0
"""LightX2V's ``general_sparse_attn``: an operator for its masks of 64-token blocks.

``{"self_attn_1_type": "general_sparse_attn", ...}`` takes a generator of masks and an operator by
their names. Its generators make masks of whatever block size the operator names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import vsa
from vsa.values.grid import SLOTS

NAME = "vsa_operator"


class VsaOperator:
    """Attention over the blocks that a mask keeps, on tokens where they lie.

    Attributes:
        q_block_size: tokens of a query block, 64; and so ``k_block_size``.
    """

    def __init__(self, operator_setting: dict[str, Any] | None = None) -> None:
        if operator_setting:
            raise ValueError(f"operator_setting must be empty, but it is {operator_setting}")
        self.q_block_size = self.k_block_size = SLOTS

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        **others: Any,
    ) -> Tensor:
        """Attention of one sequence.

        Args:
            q: (S, heads, head_dim), and so are k and v; the last block may be short.
            k: see q.
            v: see q.
            mask: (1, heads, n, n) or (heads, n, n), blocks that are kept where it is not 0.
            cu_seqlens_q: where sequences begin: one alone is taken, of all tokens. Its end is read
                where max_seqlen_q does not say it, which waits for the device.
            cu_seqlens_kv: see cu_seqlens_q.
            max_seqlen_q: tokens of q, all of which are real.
            max_seqlen_kv: tokens of k.
            others: ``causal`` must be False, ``softmax_scale`` is the scale; the rest is not read.

        Returns:
            (S, heads * head_dim).
        """
        for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
            if ends is not None and ends.numel() > 2:
                raise ValueError(f"{name} must name one sequence, but names {ends.numel() - 1}")
        if not isinstance(mask, Tensor) or mask.ndim not in (3, 4):
            raise ValueError(
                "mask must be a tensor (heads, n, n) or (1, heads, n, n), but it is "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        for name, length, ends, x in (
            ("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q),
            ("max_seqlen_kv", max_seqlen_kv, cu_seqlens_kv, k),
        ):
            if length is None and ends is not None:
                name, length = name.replace("max_seqlen", "cu_seqlens"), int(ends[-1])
            if length is not None and int(length) != len(x):
                raise ValueError(
                    f"{name} must be {len(x)}, the tokens that are given, but it is {length}: "
                    "padding after a sequence is not taken"
                )
        if others.get("causal"):
            raise ValueError("causal must be False: a mask of blocks has no causal diagonal")
        kept = mask.bool()
        selection = vsa.Selection.from_mask(kept[None] if kept.ndim == 3 else kept)
        scale = others.get("softmax_scale")
        out = vsa.block_sparse_attention(
            q[None], k[None], v[None], selection, tile=(1, 1, SLOTS), scale=scale
        )
        return out.flatten(2)[0]


def register() -> None:
    """Add the operator ``vsa_operator``; a second call changes nothing."""
    from lightx2v.utils.registry_factory import SPARSE_OPERATOR_REGISTER

    if NAME not in SPARSE_OPERATOR_REGISTER:
        SPARSE_OPERATOR_REGISTER.register(VsaOperator, key=NAME)
