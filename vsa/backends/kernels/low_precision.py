# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits by the project's own kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vsa.backends.kernels.calls import Grids, Located3, LocatedGates, Shared, forward_call
from vsa.backends.kernels.forward import neighbour_axes, new_on, positive_scale
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import Located, address, addressable, dtype_name, view
from vsa.backends.kernels.text import text_of
from vsa.values.grid import SLOTS, Grid
from vsa.values.problem import Problem

MOST_HELD = 0.15
"""Of the bytes of q, k and v: what tiles in eight bits take at a time, if a head's take less."""


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
    _, rows = _rows_of_text(machine, text_valid, k, (grid, grid))
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


def forward(machine: Machine, problem: Problem, precision: str) -> tuple[Tensor, Tensor]:
    """Results as in ``vsa.backends.base.Backend.low_precision``, "int8" or "fp8".

    Some key heads of a batch element after the other, so that their tiles take little memory.
    """
    from vsa import _C

    grid, kv_grid = problem.grids
    sign, scale = positive_scale(problem.scale)
    q = addressable(problem.q * sign if sign != 1 else problem.q)
    k, v, text_valid = addressable(problem.k), addressable(problem.v), problem.text_valid
    batch, _, heads, _ = q.shape
    group = heads // k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(batch, heads, q.shape[1], dtype=torch.float32)
    tile_counter = q.new_empty(1, dtype=torch.int32)
    for b in range(batch):
        one = slice(b, b + 1)
        valid = None if text_valid is None else text_valid[one]
        rows = _rows_of_text(machine, valid, q[one], (grid, kv_grid))
        for of_keys in _slices(problem):
            of_queries = slice(of_keys.start * group, of_keys.stop * group)
            keys, values = k[one, :, of_keys], v[one, :, of_keys]
            tiles = quantise(machine, keys, values, kv_grid, valid, precision)
            bitmap = problem.bitmap[one, of_queries].contiguous()
            axes = neighbour_axes(machine, bitmap, grid.tiles, bitmap.shape[1], tile_counter)
            queries = q[one, :, of_queries]
            call = forward_call(
                Located3(queries, queries),
                Located3(keys, keys),
                Located3(values, values),
                Shared((grid, kv_grid), scale, bitmap, axes, *rows),
                LocatedGates(),
                out[one, :, of_queries],
                None,
                lse[one, of_queries],
                tile_counter,
            )
            machine.run(
                _C.LowPrecisionForward(
                    forward=call,
                    fp8=precision == "fp8",
                    images=tiles.images.data_ptr(),
                    channels=tiles.channels.data_ptr(),
                ),
                q.device,
            )
    return out, lse


def _rows_of_text(
    machine: Machine, text_valid: Tensor | None, x: Tensor, grids: Grids
) -> tuple[Located | None, Located | None]:
    """Which rows of the text's tiles are real tokens: of the queries, and of the keys.

    Args:
        machine: what runs the kernel.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        x: (B, tokens, heads, head_dim), a tensor of the call.
        grids: of the queries and of the keys.
    """
    text = text_of(text_valid, x.shape[0], x.shape[3], grids, [], new_on(x.device))
    for call in text.calls:
        machine.run(call, x.device)
    return text.query_rows, text.key_rows


def _slices(problem: Problem) -> list[slice]:
    """Key heads whose tiles are there at a time."""
    from vsa import _C

    q, k, v = problem.q, problem.k, problem.v
    _, kv_grid = problem.grids
    tiles = kv_grid.num_tiles + -(-kv_grid.prefix // SLOTS) + -(-kv_grid.suffix // SLOTS)
    given = sum(x.numel() * x.element_size() for x in (q, k, v))
    step = max(1, int(MOST_HELD * given / (tiles * _C.quantised_tile_bytes(q.shape[-1]))))
    return [slice(at, min(at + step, k.shape[2])) for at in range(0, k.shape[2], step)]
