# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits by the project's own kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import address, addressable, dtype_name, text_rows, view
from vsa.values.grid import SLOTS, Grid


class Quantised(NamedTuple):
    """Keys and values in eight bits.

    Attributes:
        images: (B, kv_heads, tiles, bytes) uint8, of the video's tiles and then of the text's, as
            they lie in shared memory (csrc/tile/quantised_tile.h).
        channels: (B, kv_heads, 2, head_dim) fp32: what was subtracted from all keys, and the scales
            of the values.
    """

    images: Tensor
    channels: Tensor


def quantise(
    machine: Machine, k: Tensor, v: Tensor, grid: Grid, text_valid: Tensor | None, precision: str
) -> Quantised:
    """Keys and values (B, S_k, kv_heads, head_dim), bf16 or fp16, in "int8" or "fp8".

    Args:
        machine: what runs the kernels.
        k: see above.
        v: like k.
        grid: of the keys.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        precision: of the keys; values are e4m3.
    """
    from vsa import _C

    k, v = addressable(k), addressable(v)
    batch, _, heads, head_dim = k.shape
    tiles = grid.num_tiles + -(-grid.prefix // SLOTS) + -(-grid.suffix // SLOTS)
    rows = text_rows(text_valid, batch, grid, k.device)
    records = k.new_empty(batch, heads, head_dim, _C.CHANNEL_RECORD_BYTES, dtype=torch.uint8)
    made = Quantised(
        k.new_empty(batch, heads, tiles, _C.quantised_tile_bytes(head_dim), dtype=torch.uint8),
        k.new_empty(batch, heads, 2, head_dim, dtype=torch.float32),
    )
    call = _C.QuantiseTiles(
        k=view(k),
        v=view(v),
        grid=grid.as_ints(),
        text_rows=address(rows),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype_name(k),
        fp8=precision == "fp8",
        records=records.data_ptr(),
        channels=made.channels.data_ptr(),
        images=made.images.data_ptr(),
    )
    machine.run(call, k.device)
    return made
