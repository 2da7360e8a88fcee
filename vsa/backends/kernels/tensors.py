# SPDX-License-Identifier: Apache-2.0
"""What the kernels are told of tensors: addresses and strides, and copies where TMA needs them.

Tensors are read and written where they are, through tensor maps over their strides. Only what TMA
cannot address is copied: strides or addresses that are no multiple of 16 bytes, and batch elements
that do not follow each other as heads do when heads lie outside tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vsa.backends.kernels.placeholder import Placeholder, contiguous_strides
from vsa.values.grid import SLOTS, Grid

ALIGNMENT = 16
"""Bytes that addresses and strides of a tensor map must be a multiple of."""
MOST_STRIDE = 2**40
"""Bytes that a stride of a tensor map must stay below."""

Located = Tensor | Placeholder
"""Something that has an address, a shape, strides and a dtype."""

View = tuple[int, int, int, int]
"""Address, and strides of batch, token and head in elements."""


def addressable(x: Tensor) -> Tensor:
    """The tensor (B, S, heads, head_dim), or a contiguous copy if no tensor map describes it."""
    if is_addressable(x) and x.data_ptr() % ALIGNMENT == 0:
        return x
    return contiguous_copy(x)


def contiguous_copy(x: Tensor) -> Tensor:
    """A tensor of the same numbers at an aligned address."""
    return x.clone(memory_format=torch.contiguous_format)


def is_addressable(x: Tensor) -> bool:
    """Whether a tensor map describes the strides of (B, S, heads, head_dim)."""
    batch, token, head, channel = x.stride()
    strides = [
        stride * x.element_size()
        for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
        if size > 1
    ]
    aligned = all(0 < bytes_ < MOST_STRIDE and bytes_ % ALIGNMENT == 0 for bytes_ in strides)
    inside = x.shape[2] == 1 or head < token
    foldable = inside or x.shape[0] == 1 or batch == head * x.shape[2]
    return channel == 1 and aligned and foldable


def views(x: Located, text: Located, grid: Grid) -> tuple[View, View, View]:
    """The video, the prefix and the suffix of x; the last two where ``text`` has them.

    By arithmetic: slices would be nine tensors more per call.
    """
    of_text = view(text)
    return (
        _from_token(view(x), grid.prefix, x),
        of_text,
        _from_token(of_text, text.shape[1] - grid.suffix, text),
    )


def view(x: Located) -> View:
    """What the kernels are told of a tensor (B, tokens, heads, head_dim)."""
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _from_token(whole: View, token: int, x: Located) -> View:
    """The view of x that starts at a token."""
    address, batch, stride, head = whole
    return address + token * stride * x.element_size(), batch, stride, head


def beginning(x: Located, *shape: int) -> Located:
    """A contiguous tensor of another shape where a contiguous one begins."""
    if isinstance(x, Placeholder):
        return replace(x, shape=shape, strides=contiguous_strides(shape))
    return x.view(-1)[: math.prod(shape)].view(shape)


def as_matrices(x: Located, matrices: int) -> Located:
    """(B, heads, tiles, head_dim) as (matrices, rows, head_dim); a view of a contiguous tensor."""
    if isinstance(x, Placeholder):
        return beginning(x, matrices, math.prod(x.shape[:-1]) // matrices, x.shape[-1])
    return x.reshape(matrices, -1, x.shape[-1])


def text_tiles(grid: Grid) -> int:
    """Runs of 64 tokens that the text before and after the video is cut into."""
    return -(-grid.prefix // SLOTS) - (-grid.suffix // SLOTS)


def one_per_tile(name: str, x: Tensor) -> Tensor:
    """Numbers of real tokens of padded tiles as kernels read them.

    Raises:
        TypeError: numbers of another kind, which an operator alone can bring here.
    """
    if x.dtype is not torch.int32 or x.ndim != 1:
        raise TypeError(
            f"{name} must be int32 with one number for each tile, but it is {x.dtype} of the shape "
            f"{tuple(x.shape)}"
        )
    return x.contiguous()


def address(x: Located | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if x is None else x.data_ptr()


def dtype_name(x: Located) -> str:
    """The dtype as the compiled part names it."""
    return str(x.dtype).removeprefix("torch.")
