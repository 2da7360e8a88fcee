# SPDX-License-Identifier: Apache-2.0
"""The forward of the fine stage by the project's own kernels, gates and coarse output included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.tensors import (
    address,
    addressable,
    dtype_name,
    text_rows,
    view,
    views,
    without_invalid_text,
)
from vsa.values.grid import Extent, Grid
from vsa.values.problem import Gates, Problem

if TYPE_CHECKING:
    from vsa import _C


def gate_addresses(gates: Gates) -> _C.Gates:
    """What the kernels are told of gates; the tensors must outlive the launch."""
    from vsa import _C

    return _C.Gates(
        fine=_numbers(gates.gate_fine),
        coarse=_numbers(gates.gate_coarse),
        coarse_rows=address(gates.coarse),
    )


def _numbers(gate: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """Address, 1 for fp32, and strides; zeros where there is no gate."""
    if gate is None:
        return 0, 0, 0, 0, 0, 0
    batch, token, head, channel = gate.stride()
    return gate.data_ptr(), int(gate.dtype == torch.float32), batch, token, head, channel


def forward(machine: Machine, problem: Problem, gates: Gates) -> tuple[Tensor, Tensor]:
    """Results as in ``vsa.backends.base.Backend.forward``.

    With gates the output is the combined one, rounded once: the fine stage's part of it is never
    written.
    """
    from vsa import _C

    grid, kv_grid = problem.grids
    sign, scale = positive_scale(problem.scale)
    q = addressable(problem.q * sign if sign != 1 else problem.q)
    k, v = addressable(problem.k), addressable(problem.v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    bitmap, text_valid = problem.bitmap.contiguous(), problem.text_valid
    rows = rows_of_text(text_valid, q, (grid, kv_grid))
    clean = [without_invalid_text(x, text_valid, kv_grid) for x in (k, v)]
    axes = neighbour_axes(machine, bitmap, grid.tiles, q.shape[2])
    tile_counter = torch.empty(1, dtype=torch.int32, device=q.device)
    call = _C.FineForward(
        problem=fine_problem(q, k, bitmap, axes, rows, scale, (grid, kv_grid)),
        q=views(q, q, grid),
        k=views(k, clean[0], kv_grid),
        v=views(v, clean[1], kv_grid),
        out=views(out, out, grid),
        gates=gate_addresses(gates),
        lse=lse.data_ptr(),
        tile_counter=tile_counter.data_ptr(),
    )
    machine.run(call, q.device)
    return out, lse


def combine(machine: Machine, fine: Tensor, gates: Gates, grid: Grid) -> Tensor:
    """Both branches together: gate_fine * fine + gate_coarse * coarse[tile of the token].

    Args:
        machine: what runs the kernel.
        fine: (B, S, heads, head_dim), contiguous.
        gates: of the shape of ``fine``.
        grid: of the queries.
    """
    from vsa import _C

    out = torch.empty_like(fine)
    call = _C.Combine(
        fine=view(fine),
        out=view(out),
        gates=gate_addresses(gates),
        grid=grid.as_ints(),
        batch=fine.shape[0],
        heads=fine.shape[2],
        head_dim=fine.shape[3],
        dtype=dtype_name(fine),
    )
    machine.run(call, fine.device)
    return out


def neighbour_axes(machine: Machine, bitmap: Tensor, tiles: Extent, groups: int) -> Tensor:
    """Along which axis the tiles that a block works on together are neighbours.

    Consumers of a block share what more than one of them wants, so each head takes the axis along
    which neighbours have more in common, judged by a sample of its tiles.

    Args:
        machine: what runs the kernel.
        bitmap: (B, heads, num_tiles, words) int32, a row for every tile; contiguous.
        tiles: how many there are along t, h and w.
        groups: of heads, each of which decides as one: heads that follow each other.

    Returns:
        (B, groups) int32, ``_C.ALONG_W`` or ``_C.ALONG_T``.
    """
    from vsa import _C

    batch, heads, _, words = bitmap.shape
    axes = bitmap.new_empty(batch, groups)
    call = _C.AxisChoice(
        bitmap=bitmap.data_ptr(),
        axes=axes.data_ptr(),
        batch=batch,
        heads=heads,
        groups=groups,
        words=words,
        tiles=tiles,
    )
    machine.run(call, bitmap.device)
    return axes


def positive_scale(scale: float) -> tuple[int, float]:
    """A factor for q and a positive scale: the kernels look for the largest score."""
    if scale > 0:
        return 1, scale
    return (0 if scale == 0 else -1), -scale or 1.0


def rows_of_text(
    text_valid: Tensor | None, q: Tensor, grids: tuple[Grid, Grid]
) -> tuple[Tensor | None, Tensor | None]:
    """Valid text of the queries and of the keys, see ``text_rows``."""
    of_queries, of_keys = (text_rows(text_valid, q.shape[0], grid, q.device) for grid in grids)
    return of_queries, of_keys


def fine_problem(
    q: Tensor,
    k: Tensor,
    bitmap: Tensor,
    query_axes: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    scale: float,
    grids: tuple[Grid, Grid],
) -> _C.FineProblem:
    """What both directions are told. The tensors must outlive the launch."""
    from vsa import _C

    return _C.FineProblem(
        grid=grids[0].as_ints(),
        kv_grid=grids[1].as_ints(),
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=dtype_name(q),
        scale=scale,
        bitmap=bitmap.data_ptr(),
        query_axes=query_axes.data_ptr(),
        query_text_rows=address(rows[0]),
        key_text_rows=address(rows[1]),
    )
