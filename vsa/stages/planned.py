# SPDX-License-Identifier: Apache-2.0
"""A plan of attention, run for autograd: one node in the graph for the whole call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends.base import Forward, Prepared
from vsa.operators import fine as operators
from vsa.stages.watchers import ALIGNMENT, address_of, is_watched
from vsa.values.grid import Grid
from vsa.values.problem import Gates, Problem, Saved, Upstream
from vsa.values.selection import Selection

Layout = tuple[object, ...]
"""Shape, strides, dtype and device of a tensor."""


class Plan(NamedTuple):
    """A kind of call.

    Attributes:
        prepared: what runs it, or None for kinds that are not prepared.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        most: the most tiles of a row, where known.
        scale: factor of the scores.
        backend: name of the backend.
        gradients: whether they are wanted.
        layouts: of q, k, v, gate_fine and gate_coarse, as they were given and flat.
    """

    prepared: Prepared | None
    grid: Grid
    kv_grid: Grid
    most: int | None
    scale: float
    backend: str
    gradients: bool
    layouts: tuple[tuple[Layout, Layout] | None, ...]


def attend(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Run a plan that is prepared: out like q, and as asked for lse (B, heads, S_q), the choice."""
    assert plan.prepared is not None
    device = q.device.type
    casts = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        if plan.gradients:
            out, lse, bitmap = _Attention.apply(plan, q, k, v, gate_fine, gate_coarse)
        else:
            found = plan.prepared.forward(q, k, v, gate_fine, gate_coarse)
            out, lse, bitmap = found.out, found.lse, found.bitmap
    if bitmap is None:
        return out, lse, None
    choice = Selection(bitmap, plan.kv_grid.num_tiles, plan.grid, plan.kv_grid, plan.most)
    return out, lse, choice


class _Attention(torch.autograd.Function):
    """The whole of attention for autograd."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Any:
        assert plan.prepared is not None
        found = plan.prepared.forward(*tensors)  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if found.bitmap is not None:
            ctx.mark_non_differentiable(found.bitmap)
        ctx.save_for_backward(*tensors, *found[1:])
        return found.out, found.lse, found.bitmap

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> Any:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors
        tensors, found = saved[:5], Forward(saved[5], *saved[5:])
        grad_out = torch.zeros_like(found.fine) if grad_out is None else grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.float().contiguous()
        upstream = Upstream(grad_out, grad_lse)
        if _needs_operators() or not _as_planned(plan, tensors, found, upstream):
            return None, *_by_operators(plan, upstream, found, tensors)
        assert plan.prepared is not None
        return None, *plan.prepared.backward(upstream, found, tensors)


def _needs_operators() -> bool:
    """Whether the operators of a backward have to be seen, or differentiated again."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or is_watched()


def _as_planned(
    plan: Plan, tensors: Sequence[Tensor | None], found: Forward, upstream: Upstream
) -> bool:
    """Whether kernels can read all of these where they are.

    Tensors come back from autograd as they were saved, but for hooks, which may have copied them.
    Gradients come from anywhere.
    """
    for x, layouts in zip(tensors, plan.layouts, strict=True):
        if x is not None and (layouts is None or layout(x) not in layouts):
            return False
    q = tensors[0]
    assert q is not None
    dtypes = (
        *((x, q.dtype) for x in (found.fine, upstream.grad_out)),
        (found.kept, torch.uint8),
        (found.bitmap, torch.int32),
        *((x, torch.float32) for x in (found.lse, found.coarse, found.means, upstream.grad_lse)),
    )
    addresses = [address_of(x) for x in (*tensors, *(x for x, _ in dtypes)) if x is not None]
    return all(each and each % ALIGNMENT == 0 for each in addresses) and all(
        x is None or (x.dtype is dtype and x.device == q.device and x.is_contiguous())
        for x, dtype in dtypes
    )


def layout(x: Tensor) -> Layout:
    """What a plan knows of a tensor besides its address."""
    return x.shape, x.stride(), x.dtype, x.device


def _by_operators(
    plan: Plan, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients by the operators, which take any strides and can be differentiated no more."""
    q, k, v, gate_fine, gate_coarse = (None if x is None else flattened(x) for x in tensors)
    assert q is not None and k is not None and v is not None
    ints = plan.grid.as_ints(), plan.kv_grid.as_ints()
    assert plan.prepared is not None
    lse, bitmap, means = plan.prepared.unpacked(found)
    problem = Problem(q, k, v, bitmap, None, *ints, plan.scale, plan.backend)
    flat = Upstream(flattened(upstream.grad_out), upstream.grad_lse)
    saved = Saved(flattened(found.fine), lse)
    if gate_fine is None and gate_coarse is None:
        most = plan.kv_grid.num_tiles if plan.most is None else plan.most
        grads = operators.block_sparse_attention_backward(*flat, *saved, *problem, most)
    else:
        gates = Gates(gate_fine, gate_coarse, found.coarse)
        grads = operators.gated_attention_backward(*flat, *saved, *problem, *means, *gates)
    each = zip(tensors, (*grads, None, None), strict=False)
    return [None if x is None or grad is None else grad.view(x.shape) for x, grad in each]


def flattened(x: Tensor) -> Tensor:
    """(B, S, heads, head_dim), a view wherever strides allow."""
    # No flatten: torch.autograd.grad with is_grads_batched has no rule for it.
    return x.reshape(x.shape[0], -1, *x.shape[4:]) if x.ndim == 6 else x
