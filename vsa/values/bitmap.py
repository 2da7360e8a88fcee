# SPDX-License-Identifier: Apache-2.0
"""Bitmaps: one bit per key tile, 32 to a word, least significant bit first. Spare bits are zero."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(columns: int) -> int:
    """Words of one row of ``columns`` bits."""
    return -(-columns // WORD_BITS)


def full(columns: int, device: torch.device) -> Tensor:
    """A row in which every bit is set: (num_words(columns),) int32."""
    row = torch.full((num_words(columns),), -1, dtype=torch.int32, device=device)
    if rest := columns % WORD_BITS:
        row[-1:].fill_((1 << rest) - 1)
    return row


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


def count(bitmap: Tensor) -> Tensor:
    """Set bits of each row: (..., words) int32 -> (...) int64."""
    bits = bitmap.contiguous().view(torch.uint8)  # summed in pairs, then fours, then eights
    bits = (bits & 0x55) + (bits >> 1 & 0x55)
    bits = (bits & 0x33) + (bits >> 2 & 0x33)
    return ((bits & 0x0F) + (bits >> 4)).sum(-1, dtype=torch.int64)
