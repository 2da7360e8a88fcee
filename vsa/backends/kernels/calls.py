# SPDX-License-Identifier: Apache-2.0
"""The calls of ``vsa._C``, from tensors or from placeholders of them.

A call holds addresses: its tensors must outlive the run. Whether it runs at once or is prepared for
later, it is built here, so that both get the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vsa.backends.kernels.tensors import Located, address, dtype_name, view, views
from vsa.values.grid import Extent, Grid

if TYPE_CHECKING:
    from vsa import _C

Grids = tuple[Grid, Grid]
"""Of the queries and of the keys."""
NOWHERE = (0, 0, 0, 0)
"""The view of a tensor that is not there."""


class Located3(NamedTuple):
    """A tensor of the whole sequence, and its text where that has been copied apart."""

    whole: Located
    text: Located

    def views(self, grid: Grid) -> _C.SequenceView:
        """The video, the prefix and the suffix."""
        return views(self.whole, self.text, grid)


class LocatedGates(NamedTuple):
    """As ``vsa.values.problem.Gates``."""

    gate_fine: Located | None = None
    gate_coarse: Located | None = None
    coarse: Located | None = None


class Shared(NamedTuple):
    """What both directions of the fine stage are told, besides q, k and v.

    Attributes:
        grids: of the queries and of the keys.
        scale: positive factor of the scores.
        bitmap: (B, heads, n_q, words) int32.
        query_axes: (B, heads) int32 of ``axis_call``.
        query_text_rows: of ``vsa.backends.kernels.text``, None without text.
        key_text_rows: the same of the keys.
        sizes: (n_q,) and (n_k,) int32, real tokens of padded tiles of the queries and of the keys,
            or twice None.
    """

    grids: Grids
    scale: float
    bitmap: Located
    query_axes: Located
    query_text_rows: Located | None
    key_text_rows: Located | None
    sizes: tuple[Located | None, Located | None] = (None, None)


class Order(NamedTuple):
    """In which order groups of neighbouring tiles are worked on, see ``sort_call``.

    Attributes:
        groups: (B, heads, groups) int32, or None: as they come, text first.
        long_ones: (1,) int32, how many of them come before those of all heads.
    """

    groups: Located | None = None
    long_ones: Located | None = None


AS_THEY_COME = Order()


def check_length(name: str, x: Located, grid: Grid) -> None:
    """Kernels go by the grid, so a shorter tensor would be read past its end.

    Raises:
        ValueError: tensors and grids that do not fit, which an operator alone can bring here.
    """
    if x.shape[1] != grid.length:
        raise ValueError(
            f"{name} must have the {grid.length} tokens of its grid, but it has {x.shape[1]}"
        )


def _problem(q: Located, k: Located, v: Located, shared: Shared) -> _C.FineProblem:
    from vsa import _C

    grid, kv_grid = shared.grids
    for name, x, of in (("q", q, grid), ("k", k, kv_grid), ("v", v, kv_grid)):
        check_length(name, x, of)
    return _C.FineProblem(
        grid=shared.grids[0].as_ints(),
        kv_grid=shared.grids[1].as_ints(),
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=dtype_name(q),
        scale=shared.scale,
        bitmap=shared.bitmap.data_ptr(),
        query_axes=shared.query_axes.data_ptr(),
        query_text_rows=address(shared.query_text_rows),
        key_text_rows=address(shared.key_text_rows),
        sizes=address(shared.sizes[0]),
        kv_sizes=address(shared.sizes[1]),
    )


def _gates(gates: LocatedGates) -> _C.Gates:
    from vsa import _C

    return _C.Gates(
        fine=_gate(gates.gate_fine),
        coarse=_gate(gates.gate_coarse),
        coarse_rows=address(gates.coarse),
    )


def _gate(gate: Located | None) -> _C.GateView:
    """Address, 1 for fp32, and strides; zeros where there is no gate."""
    if gate is None:
        return 0, 0, 0, 0, 0, 0
    batch, token, head, channel = gate.stride()
    return gate.data_ptr(), int(gate.dtype == torch.float32), batch, token, head, channel


def forward_call(
    q: Located3,
    k: Located3,
    v: Located3,
    shared: Shared,
    gates: LocatedGates,
    out: Located,
    fine: Located | None,
    lse: Located,
    tile_counter: Located,
    order: Order = AS_THEY_COME,
) -> _C.FineForward:
    """The forward kernel; with gates ``out`` is combined, and ``fine`` is the part before it."""
    from vsa import _C

    grid, kv_grid = shared.grids
    return _C.FineForward(
        problem=_problem(q.whole, k.whole, v.whole, shared),
        q=q.views(grid),
        k=k.views(kv_grid),
        v=v.views(kv_grid),
        out=views(out, out, grid),
        fine=(NOWHERE, NOWHERE, NOWHERE) if fine is None else views(fine, fine, grid),
        gates=_gates(gates),
        lse=lse.data_ptr(),
        tile_counter=tile_counter.data_ptr(),
        order=address(order.groups),
        long_ones=address(order.long_ones),
    )


class Gradients(NamedTuple):
    """What the backward kernels read and write besides the problem.

    Attributes:
        fine_out: the fine stage's output.
        grad_out: gradient of the operation's output.
        grad_fine: gradient of the fine stage's output; with a fine gate the kernels write it.
        grad_q: like q, contiguous; so are ``grad_k`` and ``grad_v`` of k and v.
        grad_gate_fine: of the gate's type, contiguous, or None; so is ``grad_gate_coarse``.
        grad_coarse: (B, heads, n_q, head_dim) fp32, or None.
        grad_means: gradients of the means of q, k and v, or three times None.
        transposed: (B, heads, n_k, words) int32 of ``transpose_call``.
        key_axes: (B, kv_heads) int32 of ``axis_call``.
        key_order: of the key tiles.
        query_order: of the query tiles.
        lse: (B, heads, S_q) fp32.
        grad_lse: the same, or None.
        tile_counters: (2,) int32 of scratch.
        row_stats: (B, heads, query tiles, 2, 64) fp32 of scratch.
        grad_q_sums: (B, heads, n_q, 64, 64) fp32 of scratch for one pass, or None for two.
    """

    fine_out: Located
    grad_out: Located
    grad_fine: Located3
    grad_q: Located
    grad_k: Located
    grad_v: Located
    grad_gate_fine: Located | None
    grad_gate_coarse: Located | None
    grad_coarse: Located | None
    grad_means: Sequence[Located | None]
    transposed: Located
    key_axes: Located
    key_order: Order
    query_order: Order
    lse: Located
    grad_lse: Located | None
    tile_counters: Located
    row_stats: Located
    grad_q_sums: Located | None


def backward_call(
    q: Located3,
    k: Located3,
    v: Located3,
    shared: Shared,
    gates: LocatedGates,
    of: Gradients,
) -> _C.FineBackward:
    """The backward kernels: the pass over tokens (rows), then those over key and query tiles."""
    from vsa import _C

    grid, kv_grid = shared.grids
    return _C.FineBackward(
        problem=_problem(q.whole, k.whole, v.whole, shared),
        q=q.views(grid),
        k=k.views(kv_grid),
        v=v.views(kv_grid),
        grad_fine=of.grad_fine.views(grid),
        grad_q=views(of.grad_q, of.grad_q, grid),
        grad_k=views(of.grad_k, of.grad_k, kv_grid),
        grad_v=views(of.grad_v, of.grad_v, kv_grid),
        fine_out=view(of.fine_out),
        grad_out=view(of.grad_out),
        gates=_gates(gates),
        grad_fine_tokens=view(of.grad_fine.whole),
        grad_gate_fine=address(of.grad_gate_fine),
        grad_gate_coarse=address(of.grad_gate_coarse),
        grad_coarse=address(of.grad_coarse),
        grad_q_means=address(of.grad_means[0]),
        grad_k_means=address(of.grad_means[1]),
        grad_v_means=address(of.grad_means[2]),
        transposed_bitmap=of.transposed.data_ptr(),
        key_axes=of.key_axes.data_ptr(),
        key_order=address(of.key_order.groups),
        long_keys=address(of.key_order.long_ones),
        query_order=address(of.query_order.groups),
        long_queries=address(of.query_order.long_ones),
        lse=of.lse.data_ptr(),
        grad_lse=address(of.grad_lse),
        tile_counters=of.tile_counters.data_ptr(),
        grad_q_sums=address(of.grad_q_sums),
        row_stats=of.row_stats.data_ptr(),
    )


def axis_call(
    bitmap: Located, axes: Located, tiles: Extent, counters: Located | None = None
) -> _C.AxisChoice:
    """Along which axis tiles are taken together: bitmap (B, heads, tiles, words), axes (B, n).

    ``counters`` (n,) int32 are cleared for the kernels that come next.
    """
    from vsa import _C

    batch, heads, _, words = bitmap.shape
    return _C.AxisChoice(
        bitmap=bitmap.data_ptr(),
        axes=axes.data_ptr(),
        batch=batch,
        heads=heads,
        groups=axes.shape[1],
        words=words,
        tiles=tiles,
        counters=address(counters),
        count=0 if counters is None else counters.shape[0],
    )


def transpose_call(
    bitmap: Located, columns: int, target: Located, counts: Located
) -> _C.BitmapTranspose:
    """Rows and columns of bitmaps (B, heads, rows, words) exchanged, and the bits of each row."""
    from vsa import _C

    batch, heads, rows, _ = bitmap.shape
    return _C.BitmapTranspose(
        source=bitmap.data_ptr(),
        target=target.data_ptr(),
        counts=counts.data_ptr(),
        bitmaps=batch * heads,
        rows=rows,
        columns=columns,
    )


def groups_of(tiles: int, together: int) -> int:
    """How many groups of neighbouring tiles there are."""
    return -(-tiles // together)


def sort_call(
    lengths: Located, axes: Located, order: Order, text_tiles: int, layers: int, together: int
) -> _C.GroupSort:
    """Groups of neighbouring tiles by the longest row among them.

    Args:
        lengths: (B, heads, tiles) int32, bits of each row.
        axes: (B, n) int32 of ``axis_call``, n groups of heads.
        order: (B, n, groups), written, and a number that has been cleared.
        text_tiles: tiles of the text, which come first in the numbering of groups.
        layers: tiles of the video along t.
        together: tiles of a group.
    """
    from vsa import _C

    batch, heads, tiles = lengths.shape
    return _C.GroupSort(
        counts=lengths.data_ptr(),
        axes=axes.data_ptr(),
        order=address(order.groups),
        long_ones=address(order.long_ones),
        batch=batch,
        heads=heads,
        head_groups=axes.shape[1],
        tiles=tiles,
        text_tiles=text_tiles,
        layers=layers,
        together=together,
    )


def means_call(
    xs: Sequence[Located],
    grids: Sequence[Grid],
    means: Sequence[Located],
    sizes: Sequence[Located | None] | None = None,
) -> _C.TileMeans:
    """Means of the tiles of up to three tensors, into ``means``, (B, heads, tiles, head_dim).

    ``sizes`` (tiles,) int32 are the real tokens of each, where tiles are padded.
    """
    from vsa import _C

    for x, grid in zip(xs, grids, strict=False):
        check_length("a tensor of tile means", x, grid)
    return _C.TileMeans(
        tensors=[
            _C.MeanTensor(
                tokens=view(x),
                grid=grid.as_ints(),
                sizes=address(of),
                heads=x.shape[2],
                means=mean.data_ptr(),
            )
            for x, grid, mean, of in zip(xs, grids, means, sizes or [None] * len(xs), strict=True)
        ],
        batch=xs[0].shape[0],
        head_dim=xs[0].shape[3],
        dtype=dtype_name(xs[0]),
    )
