# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits by the project's own kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends.kernels.calls import (
    Grids,
    Located3,
    LocatedGates,
    Shared,
    axis_call,
    forward_call,
)
from vsa.backends.kernels.forward import new_on, positive_scale
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import (
    Located,
    address,
    addressable,
    beginning,
    dtype_name,
    text_tiles,
    view,
)
from vsa.backends.kernels.text import Make, text_of
from vsa.values.grid import Grid
from vsa.values.problem import Gates, Problem

MOST_HELD = 0.15
"""Of the bytes of q, k and v: what tiles in eight bits take at a time, if a head's take less."""


class Quantised(NamedTuple):
    """Keys and values in eight bits, of the key heads of a slice.

    Attributes:
        images: (B, kv_heads, tiles, bytes) uint8, of the video's tiles and then of the text's, as
            they lie in shared memory (csrc/tile/quantised_tile.h).
        channels: (B, kv_heads, 2, head_dim) fp32: what was subtracted from all keys, and the scales
            of the values.
        records: (B, kv_heads, head_dim, bytes) uint8, of the pass itself.
    """

    images: Located
    channels: Located
    records: Located

    @staticmethod
    def room(grid: Grid, batch: int, heads: int, head_dim: int, make: Make) -> Quantised:
        """For keys and values of a grid."""
        from vsa import _C

        tiles = grid.num_tiles + text_tiles(grid)
        image = _C.quantised_tile_bytes(head_dim)
        return Quantised(
            make((batch, heads, tiles, image), torch.uint8),
            make((batch, heads, 2, head_dim), torch.float32),
            make((batch, heads, head_dim, _C.CHANNEL_RECORD_BYTES), torch.uint8),
        )

    def of_heads(self, heads: int) -> Quantised:
        """The same room for fewer heads of one batch element."""
        return Quantised(*(beginning(x, 1, heads, *x.shape[2:]) for x in self))


class Call(NamedTuple):
    """What is computed: tensors, or placeholders of them.

    Attributes:
        q: (B, S_q, heads, head_dim), bf16 or fp16; addressable, and so are ``k`` and ``v``.
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        bitmap: (B, heads, n_q, words) int32, contiguous.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        grids: of the queries and of the keys.
        scale: positive factor of the scores.
        gates: and the coarse attention's output, where there are any.
        out: like q, contiguous.
        lse: (B, heads, S_q) fp32.
        axes: (B, heads) int32 of scratch.
        tile_counter: (1,) int32 of scratch.
        precision: "int8" or "fp8".
    """

    q: Located
    k: Located
    v: Located
    bitmap: Located
    text_valid: Located | None
    grids: Grids
    scale: float
    gates: LocatedGates
    out: Located
    lse: Located
    axes: Located
    tile_counter: Located
    precision: str


def forward_calls(of: Call, make: Make) -> Iterator[Any]:
    """Everything that computes it, in order.

    Some key heads of a batch element after the other, so that their tiles take little memory: each
    slice is quantised into the room of the one before.

    Args:
        of: what to compute.
        make: for what is written on the way.
    """
    from vsa import _C

    batch, heads, kv_heads = of.q.shape[0], of.q.shape[2], of.k.shape[2]
    group, (grid, kv_grid) = heads // kv_heads, of.grids
    text = text_of(of.text_valid, batch, of.q.shape[3], of.grids, [], make)
    yield from text.calls
    step = heads_at_a_time(of.q, of.k, kv_grid)
    room = Quantised.room(kv_grid, 1, step, of.k.shape[3], make)
    for b in range(batch):
        one = slice(b, b + 1)
        query_rows, key_rows = (
            None if x is None else x[one] for x in (text.query_rows, text.key_rows)
        )
        for first in range(0, kv_heads, step):
            of_keys = slice(first, min(first + step, kv_heads))
            of_queries = slice(of_keys.start * group, of_keys.stop * group)
            q, out = (x[one, :, of_queries] for x in (of.q, of.out))
            k, v = (x[one, :, of_keys] for x in (of.k, of.v))
            bitmap, axes, lse = (x[one, of_queries] for x in (of.bitmap, of.axes, of.lse))
            gate_fine, gate_coarse = (
                None if x is None else x[one, :, of_queries]
                for x in (of.gates.gate_fine, of.gates.gate_coarse)
            )
            coarse = None if of.gates.coarse is None else of.gates.coarse[one, of_queries]
            tiles = room.of_heads(of_keys.stop - of_keys.start)
            yield quantise_call(k, v, kv_grid, key_rows, tiles, of.precision)
            yield axis_call(bitmap, axes, grid.tiles, of.tile_counter)
            yield _C.LowPrecisionForward(
                forward=forward_call(
                    Located3(q, q),
                    Located3(k, k),
                    Located3(v, v),
                    Shared(of.grids, of.scale, bitmap, axes, query_rows, key_rows),
                    LocatedGates(gate_fine, gate_coarse, coarse),
                    out,
                    None,
                    lse,
                    of.tile_counter,
                ),
                fp8=of.precision == "fp8",
                images=tiles.images.data_ptr(),
                channels=tiles.channels.data_ptr(),
            )


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
    k, v = addressable(k), addressable(v)
    (batch, _, heads, head_dim), make = k.shape, new_on(k.device)
    text = text_of(text_valid, batch, head_dim, (grid, grid), [], make)
    made = Quantised.room(grid, batch, heads, head_dim, make)
    for call in (*text.calls, quantise_call(k, v, grid, text.key_rows, made, precision)):
        machine.run(call, k.device)
    return made


def quantise_call(
    k: Located, v: Located, grid: Grid, text_rows: Located | None, to: Quantised, precision: str
) -> Any:
    """The pass that makes eight bits of keys and values (B, S_k, kv_heads, head_dim).

    Args:
        k: bf16 or fp16.
        v: like k.
        grid: of the keys.
        text_rows: which rows of the text's tiles are real tokens, None without text.
        to: where they go.
        precision: of the keys, "int8" or "fp8"; values are e4m3.
    """
    from vsa import _C

    batch, _, heads, head_dim = k.shape
    return _C.QuantiseTiles(
        k=view(k),
        v=view(v),
        grid=grid.as_ints(),
        text_rows=address(text_rows),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype_name(k),
        fp8=precision == "fp8",
        records=to.records.data_ptr(),
        channels=to.channels.data_ptr(),
        images=to.images.data_ptr(),
    )


def heads_at_a_time(q: Located, k: Located, kv_grid: Grid) -> int:
    """Key heads of a batch element whose tiles are there at a time."""
    from vsa import _C

    tiles = kv_grid.num_tiles + text_tiles(kv_grid)
    given = sum(math.prod(x.shape) * x.element_size() for x in (q, k, k))
    step = int(MOST_HELD * given / (tiles * _C.quantised_tile_bytes(q.shape[3])))
    return min(max(1, step), k.shape[2])


def forward(
    machine: Machine, problem: Problem, precision: str, gates: Gates | None = None
) -> tuple[Tensor, Tensor]:
    """Results as in ``vsa.backends.base.Backend.low_precision``, "int8" or "fp8".

    With gates the output is the combined one, rounded once.
    """
    sign, scale = positive_scale(problem.scale)
    q = addressable(problem.q * sign if sign != 1 else problem.q)
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    call = Call(
        q,
        addressable(problem.k),
        addressable(problem.v),
        problem.bitmap.contiguous(),
        problem.text_valid,
        problem.grids,
        scale,
        LocatedGates() if gates is None else LocatedGates(*gates),
        out,
        lse,
        q.new_empty(batch, heads, dtype=torch.int32),
        q.new_empty(1, dtype=torch.int32),
        precision,
    )
    for each in forward_calls(call, new_on(q.device)):
        machine.run(each, q.device)
    return out, lse
