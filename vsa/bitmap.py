# SPDX-License-Identifier: Apache-2.0
"""Bitmaps: one bit per key tile, 32 to a word, least significant bit first. Spare bits are zero."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(columns: int) -> int:
    """Words of one row of ``columns`` bits."""
    return -(-columns // WORD_BITS)


def pack(mask: Tensor) -> Tensor:
    """Pack the last axis: (..., columns) bool -> (..., num_words(columns)) int32."""
    spare = num_words(mask.shape[-1]) * WORD_BITS - mask.shape[-1]
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, spare)).unflatten(-1, (-1, 8))
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << place).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack(bitmap: Tensor, columns: int) -> Tensor:
    """Unpack the last axis: (..., words) int32 -> (..., columns) bool."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = bitmap.contiguous().view(torch.uint8).unsqueeze(-1) >> place & 1
    return bits.flatten(-2)[..., :columns].bool()
