# SPDX-License-Identifier: Apache-2.0
"""A whole call of attention: by a prepared call where there is one, else stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends.base import Backend, Forward, Prepared
from vsa.backends.kernels.tensors import ALIGNMENT
from vsa.values.budget import counts_and_mass, shares_of
from vsa.values.grid import Grid
from vsa.values.problem import (
    Gates,
    Means,
    Problem,
    Saved,
    SubBlockScores,
    TileScores,
    Upstream,
    WholeCall,
    WholeSaved,
)
from vsa.values.remembered import Remembered
from vsa.values.task import NO_PADDING, Task

TaskTensors = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
_prepared: Remembered[tuple[Prepared | None]] = Remembered(256)
"""By all that a task is made of; None where it cannot be prepared."""


def forward(backend: Backend, call: WholeCall) -> tuple[Tensor, ...]:
    """Results of ``torch.ops.vsa.attention``."""
    prepared = _find(backend, call, gradients=True)
    gated = call.gate_fine is not None or call.gate_coarse is not None
    if prepared is not None:
        found = prepared.forward(*_tensors(call), *NO_PADDING)
        assert found.lse is not None and found.bitmap is not None
        return (
            found.out,
            found.lse,
            found.bitmap,
            found.fine if gated else call.q.new_empty(0),
            _nothing(call) if found.coarse is None else found.coarse,
            _nothing(call) if found.means is None else found.means,
        )
    problem, gates, means = _stages_before_fine(backend, call)
    if not gated:
        out, lse = backend.forward(problem, problem.grids[1].num_tiles)
        return out, lse, problem.bitmap, call.q.new_empty(0), _nothing(call), _nothing(call)
    out, lse, fine = backend.gated_forward(problem, gates)
    if gates.coarse is None:
        return out, lse, problem.bitmap, fine, _nothing(call), _nothing(call)
    numbers = torch.cat([mean.flatten() for mean in means])
    return out, lse, problem.bitmap, fine, gates.coarse, numbers


def inference(backend: Backend, call: WholeCall) -> tuple[Tensor, Tensor, Tensor]:
    """Results of ``torch.ops.vsa.attention_inference``."""
    prepared = _find(backend, call, gradients=False)
    if prepared is not None:
        found = prepared.forward(*_tensors(call), *NO_PADDING)
        assert found.lse is not None and found.bitmap is not None
        return found.out, found.lse, found.bitmap
    problem, gates, _ = _stages_before_fine(backend, call)
    if gates.gate_fine is None and gates.gate_coarse is None:
        out, lse = backend.forward(problem, problem.grids[1].num_tiles)
    else:
        out, lse = backend.gated_inference(problem, gates)
    return out, lse, problem.bitmap


def backward(
    backend: Backend, upstream: Upstream, saved: WholeSaved, call: WholeCall
) -> Sequence[Tensor | None]:
    """Results of ``torch.ops.vsa.attention_backward``, None for gates that are not there."""
    grad_lse = upstream.grad_lse
    upstream = Upstream(
        upstream.grad_out.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
    )
    saved = WholeSaved(*(x.contiguous() for x in saved))  # hooks may have laid them out anew
    prepared = _find(backend, call, gradients=True)
    if prepared is not None and _aligned(*upstream, *saved):
        has_coarse = call.gate_coarse is not None
        found = Forward(
            out=saved.fine,
            fine=saved.fine,
            kept=call.q.new_empty(0, dtype=torch.uint8),  # lse and bitmap are tensors of their own
            lse=saved.lse,
            bitmap=saved.bitmap,
            coarse=saved.coarse if has_coarse else None,
            means=saved.means if has_coarse else None,
        )
        return prepared.backward(upstream, found, (*_tensors(call), *NO_PADDING))
    problem = _problem(call, saved.bitmap)
    of_forward = Saved(saved.fine, saved.lse)
    if call.gate_fine is None and call.gate_coarse is None:
        grads = backend.backward(upstream, of_forward, problem, problem.grids[1].num_tiles)
        return (*grads, None, None)
    means, coarse = Means(None, None, None), None
    if call.gate_coarse is not None:
        means, coarse = _split(saved.means, call), saved.coarse
    gates = Gates(call.gate_fine, call.gate_coarse, coarse)
    return backend.gated_backward(upstream, of_forward, problem, means, gates)


def _find(backend: Backend, call: WholeCall, gradients: bool) -> Prepared | None:
    """What runs calls of this kind, None for those that go stage by stage."""
    tensors = _tensors(call)
    if not _aligned(*tensors[:3]) or call.allowed is not None:
        return None
    grids = call.grids
    counts, mass = counts_and_mass(call.topk, call.mass, call.numbers, grids[1].num_tiles)
    rule, shares = tuple(call.rule), tuple(shares_of(call.shares, call.numbers))
    kinds = (None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)
    key = (
        *kinds, *counts, mass, *call.grid, *call.kv_grid, call.runs, call.scale, backend.name,
        gradients, rule, shares,
    )  # fmt: skip
    known = _prepared.get(key)
    if known is None:
        task = Task(
            *tensors, *grids, counts, mass, call.runs, call.scale, gradients, True, True,
            rule=rule, shares=shares,
        )  # fmt: skip
        known = (backend.prepare(task),)
        _prepared.put(key, known)
    return known[0]


def _tensors(call: WholeCall) -> TaskTensors:
    """In the order of a task, whose choice is not given."""
    return call.q, call.k, call.v, call.gate_fine, call.gate_coarse, call.text_valid, None


def _nothing(call: WholeCall) -> Tensor:
    """In place of a result that is not there: each a tensor of its own, as operators must."""
    return call.q.new_empty(0, dtype=torch.float32)


def _aligned(*tensors: Tensor | None) -> bool:
    return all(x is None or x.data_ptr() % ALIGNMENT == 0 for x in tensors)


def _stages_before_fine(backend: Backend, call: WholeCall) -> tuple[Problem, Gates, list[Tensor]]:
    """Means and choice, and with a coarse gate the coarse attention."""
    grid, kv_grid = call.grids
    has_coarse = call.gate_coarse is not None
    counts, mass = counts_and_mass(call.topk, call.mass, call.numbers, kv_grid.num_tiles)
    if call.runs > 1:
        return _stages_by_sub_blocks(backend, call, counts, mass)
    xs = [call.q, call.k, call.v][: 3 if has_coarse else 2]
    means = backend.tile_means(xs, [grid, kv_grid, kv_grid][: len(xs)])
    masked = call.rule, call.allowed, shares_of(call.shares, call.numbers)
    scores = TileScores(
        means[0], means[1], None, counts, mass, None, call.scale, call.backend, *masked
    )
    chosen, coarse = backend.select(scores, means[2] if has_coarse else None)
    return _problem(call, chosen), Gates(call.gate_fine, call.gate_coarse, coarse), means


def _stages_by_sub_blocks(
    backend: Backend, call: WholeCall, counts: Sequence[int], mass: float
) -> tuple[Problem, Gates, list[Tensor]]:
    """The same where tiles are chosen by the means of their runs."""
    asked = SubBlockScores(
        call.q,
        call.k,
        None,
        counts,
        mass,
        None,
        call.grid,
        call.kv_grid,
        call.runs,
        call.scale,
        call.backend,
        call.rule,
        call.allowed,
        shares_of(call.shares, call.numbers),
    )
    v = None if call.gate_coarse is None else call.v
    chosen, means, coarse = backend.select_by_sub_blocks(asked, v)
    return _problem(call, chosen), Gates(call.gate_fine, call.gate_coarse, coarse), means


def _problem(call: WholeCall, chosen: Tensor) -> Problem:
    return Problem(
        call.q,
        call.k,
        call.v,
        chosen,
        call.text_valid,
        call.grid,
        call.kv_grid,
        call.scale,
        call.backend,
        call.rule,
        call.allowed,
    )


def _split(numbers: Tensor, call: WholeCall) -> Means:
    """The means of q, k and v that were saved one after the other."""
    grids: list[Grid] = [call.grids[0], call.grids[1], call.grids[1]]
    shapes = [
        (x.shape[0], x.shape[2], grid.num_tiles, x.shape[3])
        for x, grid in zip((call.q, call.k, call.v), grids, strict=True)
    ]
    parts = numbers.split([torch.Size(shape).numel() for shape in shapes])
    return Means(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
