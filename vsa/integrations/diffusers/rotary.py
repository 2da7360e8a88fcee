# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings, with as few passes over the tokens as PyTorch allows."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, in a family's own form."""


def turn_pairs(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Rotate channel pairs (2i, 2i + 1), in the more precise of the types of x and its angles.

    As complex numbers a pair is read once and written once. Written out in real arithmetic, which
    is what torch.compile fuses and what complex numbers have no other types for, eager PyTorch
    makes four products and two sums on the way, each an fp32 tensor as large as x.

    Args:
        xs: (..., channels) each.
        cos: broadcastable to (..., channels / 2).
        sin: likewise.

    Returns:
        Like ``xs``.
    """
    if torch.compiler.is_compiling() or cos.dtype not in (torch.float32, torch.float64):
        return [_real(x, cos, sin) for x in xs]
    angles = torch.complex(cos, sin)
    return [_complex(x, angles) for x in xs]


def _complex(x: Tensor, angles: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, angles.real.dtype))
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * angles
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def turn_halves(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Rotate channel pairs (i, i + channels / 2), in fp32 at least.

    Args:
        xs: (..., channels) each.
        cos: broadcastable to (..., channels / 2).
        sin: likewise.

    Returns:
        Like ``xs``.
    """
    turned = []
    for x in xs:
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        halves = (first * cos - second * sin, second * cos + first * sin)
        turned.append(torch.cat(halves, dim=-1).to(x.dtype))
    return turned


def of_pairs(rotary: Rotary) -> Rotary:
    """One angle per pair, from tables in which every angle stands twice."""
    return rotary[0][..., 0::2], rotary[1][..., 1::2]
