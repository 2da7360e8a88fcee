# SPDX-License-Identifier: Apache-2.0
"""Checks of a cache of keys and values, and of what goes into it."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.values import checks
from vsa.values.grid import SLOTS, Extent, best_tile


def check_kind(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of the cache's type and device, without a gradient."""
    if x.dtype != dtype:
        raise TypeError(
            f"{name} must have the dtype of the cache, but {name} is {x.dtype} and the cache is "
            f"{dtype}"
        )
    if x.device != device:
        raise ValueError(
            f"{name} must be on the device of the cache, but {name} is on {x.device} and the cache "
            f"is on {device}"
        )
    check_no_gradient(name, x)


def check_no_gradient(name: str, x: Tensor) -> None:
    """Nothing that goes into a cache wants a gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which does not flow through a cache: train with "
            "mask=vsa.masks.ChunkCausal(...), or call under torch.no_grad()"
        )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def tile_of(chunk: Extent, tile: Extent | str) -> Extent:
    """A tile that does not straddle two chunks."""
    if tile == "auto":
        return best_tile(chunk, frames=chunk[0])
    found = checks.tile("tile", tile, SLOTS)
    if chunk[0] % found[0]:
        raise ValueError(
            f"tile must have an extent along t that divides the {chunk[0]} frames of a chunk, but "
            f"{found} straddles two of them: {best_tile(chunk, frames=chunk[0])} does not"
        )
    return found
