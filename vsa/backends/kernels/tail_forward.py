# SPDX-License-Identifier: Apache-2.0
"""The forward of the tail by the project's own kernels, on top of the fine stage's."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends.kernels.calls import Located3, LocatedGates, Shared, forward_call
from vsa.backends.kernels.forward import new_on, positive_scale
from vsa.backends.kernels.machine import Machine
from vsa.backends.kernels.masked_calls import outside_tail
from vsa.backends.kernels.tail_calls import TailTensors, round_call, tail_tensors
from vsa.backends.kernels.tensors import addressable
from vsa.backends.kernels.text import text_of
from vsa.values.grid import Grid
from vsa.values.problem import Gates, Problem, TailMeans
from vsa.values.tile_mask import TileMask


def add(
    machine: Machine,
    problem: Problem,
    means: TailMeans,
    gates: Gates,
    out: Tensor,
    lse: Tensor,
    fine: Tensor | None = None,
) -> None:
    """The results of the fine stage become those of the whole softmax, in their place.

    Args:
        machine: what runs the kernels.
        problem: as the fine stage was given.
        means: tile means of the keys.
        gates: of the whole operation; the fine stage's kernel had none.
        out: (B, S_q, heads, head_dim), contiguous; with gates it becomes the combined one.
        lse: (B, heads, S_q) fp32, contiguous.
        fine: like out; with gates, what is in ``out`` before them is written here if it is wanted.
    """
    from vsa import _C

    grids = problem.grids
    sign, scale = positive_scale(problem.scale)
    q = addressable(problem.q * sign if sign != 1 else problem.q)
    text = text_of(problem.text_valid, q.shape[0], q.shape[3], grids, [], new_on(q.device))
    for each in text.calls:
        machine.run(each, q.device)
    tiles = grids[0].num_tiles, grids[1].num_tiles
    bitmap = outside_tail(problem.bitmap.contiguous(), problem.mask, *tiles)
    kept = rounded(machine, means, grids[1], q.dtype, problem.mask)
    k, v = (Located3(x, x) for x in (problem.k, problem.v))  # which this kernel does not read
    counter = lse  # nor does it count
    call = _C.TailForward(
        fine=forward_call(
            Located3(q, q),
            k,
            v,
            Shared(grids, scale, bitmap, bitmap, text.query_rows, text.key_rows),
            LocatedGates(*gates),
            out,
            fine,
            lse,
            counter,
        ),
        tail=kept.keys(),
    )
    machine.run(call, q.device)


def rounded(
    machine: Machine,
    means: TailMeans,
    kv_grid: Grid,
    dtype: torch.dtype,
    mask: TileMask | None = None,
) -> TailTensors:
    """The means as the kernels read them, zeros where a mask hides tiles from all."""
    if mask is not None:
        unseen = ~mask.seen(means[0].shape[1], means[0].device)[..., None]
        means = TailMeans(*(mean.masked_fill(unseen, 0) for mean in means))
    k_means, v_means = (mean.contiguous() for mean in means)
    batch, kv_heads, _, head_dim = k_means.shape
    kept = tail_tensors(batch, kv_heads, kv_grid, head_dim, dtype, new_on(k_means.device))
    machine.run(round_call(k_means, v_means, kept, kv_grid), k_means.device)
    return kept
