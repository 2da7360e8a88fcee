# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits by the project's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

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
from vsa.backends.kernels.head_slices import head_slices
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

if TYPE_CHECKING:
    from vsa import _C


class Quantised(NamedTuple):
    """Keys and values in eight bits, of some key heads.

    Attributes:
        images: (B, kv_heads, tiles, bytes) uint8, of the video's tiles and then of the text's, as
            they lie in shared memory (csrc/tile/quantised_tile.h).
        channels: (B, kv_heads, 2, head_dim) fp32: what was subtracted from all keys, and the scales
            of the values.
    """

    images: Located
    channels: Located

    @staticmethod
    def room(grid: Grid, batch: int, heads: int, head_dim: int, make: Make) -> Quantised:
        """For keys and values of a grid."""
        from vsa import _C

        tiles = grid.num_tiles + text_tiles(grid)
        image = _C.quantised_tile_bytes(head_dim)
        return Quantised(
            make((batch, heads, tiles, image), torch.uint8),
            make((batch, heads, 2, head_dim), torch.float32),
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
    precision: str


def forward_calls(of: Call, blocks: int, make: Make) -> Iterator[Any]:
    """Everything that computes it, in order.

    What is small is found of all heads at once. Then some key heads of a batch element after the
    other, so that their tiles take little memory: each slice is quantised into the room of the one
    before.

    Args:
        of: what to compute.
        blocks: of the forward kernel that run at a time.
        make: for what is written on the way.
    """
    from vsa import _C

    batch, heads, kv_heads = of.q.shape[0], of.q.shape[2], of.k.shape[2]
    group, (grid, kv_grid) = heads // kv_heads, of.grids
    text = text_of(of.text_valid, batch, of.q.shape[3], of.grids, [], make)
    yield from text.calls
    slices = head_slices(of.q, of.k, of.grids, blocks)
    most = max(heads.stop - heads.start for heads in slices)
    room = Quantised.room(kv_grid, 1, most, of.k.shape[3], make)
    records = room_of_records(of.k, make)
    counters = make((batch * len(slices),), torch.int32)
    yield axis_call(of.bitmap, of.axes, grid.tiles, counters)
    yield statistics_call(of.k, of.v, kv_grid, text.key_rows, records)
    for b in range(batch):
        one = slice(b, b + 1)
        query_rows, key_rows = (
            None if x is None else x[one] for x in (text.query_rows, text.key_rows)
        )
        for number, of_keys in enumerate(slices, b * len(slices)):
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
            known = statistics_call(k, v, kv_grid, key_rows, records[one, of_keys])
            yield quantise_call(known, tiles, of.precision)
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
                    counters[number : number + 1],
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
    records = room_of_records(k, make)
    statistics = statistics_call(k, v, grid, text.key_rows, records)
    for call in (*text.calls, statistics, quantise_call(statistics, made, precision)):
        machine.run(call, k.device)
    return made


def room_of_records(k: Located, make: Make) -> Located:
    """What is known of the channels of keys and values (B, S_k, kv_heads, head_dim), in bytes."""
    from vsa import _C

    return make((k.shape[0], *k.shape[2:], _C.CHANNEL_RECORD_BYTES), torch.uint8)


def statistics_call(
    k: Located, v: Located, grid: Grid, text_rows: Located | None, records: Located
) -> _C.ChannelStatistics:
    """The pass that finds what eight bits of keys and values need to know of whole heads.

    Args:
        k: (B, S_k, kv_heads, head_dim), bf16 or fp16.
        v: like k.
        grid: of the keys.
        text_rows: which rows of the text's tiles are real tokens, None without text.
        records: of ``room_of_records``, contiguous.
    """
    from vsa import _C

    batch, _, heads, head_dim = k.shape
    return _C.ChannelStatistics(
        k=view(k),
        v=view(v),
        grid=grid.as_ints(),
        text_rows=address(text_rows),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype_name(k),
        records=records.data_ptr(),
    )


def quantise_call(known: _C.ChannelStatistics, to: Quantised, precision: str) -> _C.QuantiseTiles:
    """The pass that makes eight bits of keys and values, once ``known`` has run.

    Args:
        known: of these keys and values, or of heads that they are among.
        to: where they go.
        precision: of the keys, "int8" or "fp8"; values are e4m3.
    """
    from vsa import _C

    return _C.QuantiseTiles(
        statistics=known,
        fp8=precision == "fp8",
        channels=to.channels.data_ptr(),
        images=to.images.data_ptr(),
    )


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
        precision,
    )
    for each in forward_calls(call, machine.at_a_time(q.device), new_on(q.device)):
        machine.run(each, q.device)
    return out, lse
