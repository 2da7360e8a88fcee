# SPDX-License-Identifier: Apache-2.0
"""Tensors of which a prepared call knows everything but the address."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

OFFSET_BITS = 48
"""Where the number of a slot begins in a prepared address: csrc/bind/program.h."""
ALIGNMENT = 256
"""Bytes that parts of a workspace are a multiple of."""


@dataclass(frozen=True)
class Placeholder:
    """Stands for a tensor where calls are built; a run gives the address of its slot.

    Attributes:
        slot: number of the slot, from 0, as addresses are given to a run.
        shape: of the tensor.
        strides: of the tensor, in elements.
        dtype: of the tensor.
        offset: bytes from the start of the slot.
    """

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    def data_ptr(self) -> int:
        """The prepared address."""
        return (self.slot + 1 << OFFSET_BITS) + self.offset

    @property
    def mT(self) -> Placeholder:
        """Rows and columns exchanged, as ``Tensor.mT``."""
        shape = *self.shape[:-2], self.shape[-1], self.shape[-2]
        strides = *self.strides[:-2], self.strides[-1], self.strides[-2]
        return replace(self, shape=shape, strides=strides)

    def __getitem__(self, at: slice | tuple[slice, ...]) -> Placeholder:
        """A part, by slices of the first axes."""
        shape, offset = list(self.shape), self.offset
        for axis, some in enumerate(at if isinstance(at, tuple) else (at,)):
            start, stop, _ = some.indices(shape[axis])
            shape[axis] = stop - start
            offset += start * self.strides[axis] * self.dtype.itemsize
        return replace(self, shape=tuple(shape), offset=offset)

    def stride(self) -> tuple[int, ...]:
        """In elements."""
        return self.strides

    def element_size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a tensor without gaps."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Workspace:
    """Parts of one allocation.

    Attributes:
        slot: its slot.
        nbytes: of all parts so far.
    """

    def __init__(self, slot: int) -> None:
        self.slot, self.nbytes = slot, 0

    def part(self, shape: Sequence[int], dtype: torch.dtype) -> Placeholder:
        """A contiguous tensor in it."""
        offset = self.nbytes
        self.nbytes += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return Placeholder(self.slot, tuple(shape), contiguous_strides(shape), dtype, offset)


def part_of(memory: Tensor, part: Placeholder) -> Tensor:
    """A part of a workspace as a tensor. Hooks of autograd may have put it inside other memory."""
    if memory.dtype != part.dtype:
        memory = memory.view(part.dtype)
    start = memory.storage_offset() + part.offset // part.dtype.itemsize
    return memory.as_strided(part.shape, part.strides, start)
