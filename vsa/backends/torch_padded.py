# SPDX-License-Identifier: Apache-2.0
"""Means of padded tiles in plain PyTorch: what lies in padding is not a number to them."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends.tiles import accumulation_dtype
from vsa.values import padded
from vsa.values.grid import SLOTS


def tile_means(x: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the real tokens of every tile, zero where there are none.

    Args:
        x: (B, 64 * n, heads, head_dim), any strides.
        sizes: (n,) int32, real tokens of each tile.

    Returns:
        (B, heads, n, head_dim), fp32 or wider, contiguous.
    """
    real = padded.real_slots(sizes)[..., None, None]
    tokens = torch.where(real, x.unflatten(1, (-1, SLOTS)), 0)
    sums = tokens.sum(2, dtype=accumulation_dtype(x))
    return (sums / sizes.clamp(min=1)[:, None, None]).transpose(1, 2).contiguous()


def spread_means(grad: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of ``tile_means``: each real token gets its tile's, over the tile's size.

    Args:
        grad: (B, heads, n, head_dim).
        sizes: (n,) int32.
        dtype: the type of x.

    Returns:
        (B, 64 * n, heads, head_dim), zeros in padding.
    """
    rows = (grad / sizes.clamp(min=1)[:, None]).to(dtype).transpose(1, 2)
    real = padded.real_slots(sizes)[..., None, None]
    return torch.where(real, rows.unsqueeze(2), 0).flatten(1, 2)


def merged(means: Tensor, sizes: Tensor, of_whole: Tensor, parts: int) -> Tensor:
    """Means of tiles from the means of their parts.

    Args:
        means: (B, heads, n * parts, head_dim).
        sizes: (n * parts,) int32, real tokens of each part.
        of_whole: (n,) int32, real tokens of each tile.
        parts: of a tile.

    Returns:
        (B, heads, n, head_dim), the type of ``means``.
    """
    share = sizes.to(means.dtype).view(-1, parts, 1) / of_whole.clamp(min=1)[:, None, None]
    return (means.unflatten(2, (-1, parts)) * share).sum(3)


EMPTY_SCORE = -1e30
"""Stands for -inf, whose products would be NaN; times a scale it is below any score."""


def without_empty(q_means: Tensor, k_means: Tensor, kv_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Means whose products keep key tiles without a token out of a softmax, and last in a choice.

    There are two more channels: 1 and 0 in those of the queries, and in the first of the keys what
    is added to a score; an even number of channels is what the kernels multiply fastest.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        kv_sizes: (n_k,) int32, real tokens of each key tile.
    """
    bias = torch.where(kv_sizes > 0, 0.0, EMPTY_SCORE).to(k_means.dtype)
    of_keys = torch.stack((bias, torch.zeros_like(bias)), dim=-1)
    of_queries = q_means.new_zeros(2)
    of_queries[:1].fill_(1)
    return (
        torch.cat((q_means, of_queries.expand(*q_means.shape[:3], 2)), dim=-1),
        torch.cat((k_means, of_keys.expand(*k_means.shape[:2], -1, -1)), dim=-1),
    )
