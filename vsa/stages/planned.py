# SPDX-License-Identifier: Apache-2.0
"""A plan of attention, run for autograd: one node in the graph for the whole call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.backends.base import Forward, Prepared, Ready
from vsa.operators import fine as operators
from vsa.operators import padded as padded_operators
from vsa.stages.forms import AS_GIVEN, Forms, Tensors, Tokens, brought_into
from vsa.stages.select import everything
from vsa.stages.watchers import ALIGNMENT, address_of, is_watched
from vsa.values import padded
from vsa.values.grid import SLOTS, Grid
from vsa.values.problem import Gates, Means, PaddedProblem, Problem, Saved, Upstream
from vsa.values.selection import Selection
from vsa.values.task import NO_PADDING
from vsa.values.tile_mask import TileMask
from vsa.values.transforms import savable

TENSORS, GRADIENTS = 11, 5
"""Tensors that a plan takes, and how many of them, the first ones, have gradients."""
UNPADDED = 7
"""Those of a video."""
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
        layouts: of all tensors in their forms, as they were shaped and flat.
        forms: that tensors are brought into.
        everything: whether all tiles are kept, whatever the scores.
        hooked: whether hooks see what autograd saves: then it is what the operators save, since
            checkpointing compares it with that of another forward, which may have had no plan.
        tail: whether tiles that are not chosen enter the softmax by their means.
        mask: which tiles a row may choose, a rule; None for all.
        parts: of padded tiles, tiles of 64 slots in one of the caller's; 0 for a video.
    """

    prepared: Prepared | None
    grid: Grid
    kv_grid: Grid
    most: int | None
    scale: float
    backend: str
    gradients: bool
    layouts: tuple[tuple[Layout, Layout] | None, ...]
    forms: Forms
    everything: bool
    hooked: bool
    tail: bool
    mask: TileMask | None
    parts: int = 0


def attend(
    plan: Plan,
    tokens: Tokens,
    text_valid: Tensor | None,
    selection: Selection | None,
    ready: Ready | None = None,
    held: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Run a plan that is prepared: out like q, and as asked for lse (B, heads, S_q), the choice.

    Args:
        plan: of calls like this one.
        tokens: of the call, as the user gave them.
        text_valid: the same.
        selection: as given, or None for a choice that is made.
        ready: is called before anything but q and k is read.
        held: the memory of a cache, which has no gradients.
    """
    assert plan.prepared is not None
    device = tokens[0].device.type
    bitmap = None
    if plan.everything:
        selection = everything(tokens[0], plan.grid, plan.kv_grid, plan.mask)
    if selection is not None:
        selection = selection.savable()
        bitmap = selection.bitmap
    if text_valid is not None:
        text_valid = savable(text_valid)
    casts = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        if plan.forms != AS_GIVEN:
            tokens = brought_into(plan.forms, tokens)
        tensors = *tokens, text_valid, bitmap, *NO_PADDING
        out, lse, chosen = run(plan, tensors, ready, held)
    if selection is None and chosen is not None:
        grids = plan.grid, plan.kv_grid
        selection = Selection(chosen, plan.kv_grid.num_tiles, *grids, plan.most, plan.mask)
    return out, lse, selection


def run(
    plan: Plan, tensors: Tensors, ready: Ready | None = None, held: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Out, and as asked for lse and bitmap, of tensors in their forms, outside of autocast."""
    if plan.gradients:
        out, lse, chosen = _Attention.apply(plan, ready, *tensors)
        return out, lse, chosen
    assert plan.prepared is not None
    found = plan.prepared.forward(*tensors, ready=ready, held=held)
    return found.out, found.lse, found.bitmap


class _Attention(torch.autograd.Function):
    """The whole of attention for autograd."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, ready: Ready | None, *tensors: Tensor | None) -> Any:
        assert plan.prepared is not None
        found = plan.prepared.forward(*tensors, ready=ready)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if found.bitmap is not None:
            ctx.mark_non_differentiable(found.bitmap)
        if plan.hooked:
            ctx.shapes = [None if x is None else x.shape for x in tensors[:GRADIENTS]]
            ctx.save_for_backward(*_as_operators_save(plan, tensors, found))
        else:
            ctx.save_for_backward(*tensors, *found[1:])
        return found.out, found.lse, found.bitmap

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> Any:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        if plan.hooked:
            tensors, found = _from_operators(plan, saved)
        else:
            tensors, found = saved[:TENSORS], Forward(saved[TENSORS], *saved[TENSORS:])
        grad_out = torch.zeros_like(found.fine) if grad_out is None else grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.float().contiguous()
        upstream = Upstream(grad_out, grad_lse)
        if _needs_operators() or not _as_planned(plan, tensors, found, upstream):
            grads = _by_operators(plan, upstream, found, tensors)
        else:
            assert plan.prepared is not None
            grads = plan.prepared.backward(upstream, found, tensors)
        if plan.hooked:  # tensors were saved flat
            grads = [
                None if grad is None else grad.view(shape)
                for grad, shape in zip(grads, ctx.shapes, strict=True)
            ]
        return None, None, *grads, *[None] * (TENSORS - GRADIENTS)


def _as_operators_save(plan: Plan, tensors: Tensors, found: Forward) -> Tensors:
    """What ``vsa.operators`` save of the same call, in their order."""
    assert plan.prepared is not None
    *flat, text_valid, given = (
        x if x is None or x.ndim != 6 else flattened(x) for x in tensors[:UNPADDED]
    )
    q, k, v, gate_fine, gate_coarse = flat
    lse, chosen, means = plan.prepared.unpacked(found)
    # Detached, since a view of what the node returns would hold the node that holds it.
    out, bitmap = flattened(found.fine.detach()), given if chosen is None else chosen
    problem = out, lse, q, k, v, bitmap, text_valid
    return *problem, *means, gate_fine, gate_coarse, found.coarse


def _from_operators(plan: Plan, saved: Tensors) -> tuple[Tensors, Forward]:
    """Flat tensors and what their forward has found, from what ``_as_operators_save`` returned."""
    out, lse, q, k, v, bitmap, text_valid, *means, gate_fine, gate_coarse, coarse = saved
    assert out is not None and bitmap is not None
    given, chosen = (bitmap, None) if plan.layouts[UNPADDED - 1] else (None, bitmap)
    numbers = [mean.flatten() for mean in means if mean is not None]
    found = Forward(
        out=out,
        fine=out,
        kept=out.new_empty(0, dtype=torch.uint8),  # lse and bitmap are tensors of their own
        lse=lse,
        bitmap=chosen,
        coarse=coarse,
        means=torch.cat(numbers) if numbers else None,
    )
    return (q, k, v, gate_fine, gate_coarse, text_valid, given, *NO_PADDING), found


def _needs_operators() -> bool:
    """Whether the operators of a backward have to be seen, or differentiated again."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or is_watched()


def _as_planned(plan: Plan, tensors: Tensors, found: Forward, upstream: Upstream) -> bool:
    """Whether kernels can read all of these where they are.

    Tensors come back from autograd as they were saved, but for hooks, which may have copied them.
    Gradients come from anywhere.
    """
    for x, layouts in zip(tensors, plan.layouts, strict=True):
        if x is not None and (layouts is None or layout(x) not in layouts):
            return False
    q = tensors[0]
    assert q is not None and plan.prepared is not None
    dtypes = (
        *((x, q.dtype) for x in (found.fine, upstream.grad_out)),
        (found.kept, torch.uint8),
        (found.bitmap, torch.int32),
        *((x, torch.float32) for x in (found.lse, found.coarse, found.means, upstream.grad_lse)),
    )
    if not all(address_of(x) for x in tensors if x is not None):
        return False
    copied = plan.prepared.copied
    aligned = [x for at, x in enumerate(tensors[:3]) if at not in copied]
    addresses = [address_of(x) for x in (*aligned, *(x for x, _ in dtypes)) if x is not None]
    return all(each and each % ALIGNMENT == 0 for each in addresses) and all(
        x is None or (x.dtype is dtype and x.device == q.device and x.is_contiguous())
        for x, dtype in dtypes
    )


def layout(x: Tensor) -> Layout:
    """What a plan knows of a tensor besides its address."""
    return x.shape, x.stride(), x.dtype, x.device


def _by_operators(
    plan: Plan, upstream: Upstream, found: Forward, tensors: Tensors
) -> list[Tensor | None]:
    """The gradients by the operators, which take any strides and can be differentiated no more."""
    of_tokens, (text_valid, given), padding = tensors[:5], tensors[5:7], tensors[7:]
    q, k, v, gate_fine, gate_coarse = (None if x is None else flattened(x) for x in of_tokens)
    assert q is not None and k is not None and v is not None
    ints = plan.grid.as_ints(), plan.kv_grid.as_ints()
    assert plan.prepared is not None
    lse, chosen, means = plan.prepared.unpacked(found)
    bitmap = given if chosen is None else chosen
    assert bitmap is not None
    flat = Upstream(flattened(upstream.grad_out), upstream.grad_lse)
    saved = Saved(flattened(found.fine), lse)
    gates = Gates(gate_fine, gate_coarse, found.coarse)
    if plan.parts:
        sizes, kv_sizes = (
            q.new_full((grid.num_tiles,), SLOTS, dtype=torch.int32)
            if given_sizes is None
            else padded.sizes_of_parts(given_sizes, plan.parts)
            for given_sizes, grid in zip(padding[:2], (plan.grid, plan.kv_grid), strict=True)
        )
        of = PaddedProblem(q, k, v, bitmap, sizes, kv_sizes, plan.scale, plan.backend)
        if gate_coarse is None:
            of_padded = padded_operators.padded_attention_backward
            return [*of_padded(*flat, *saved, *of, plan.kv_grid.num_tiles), None, None]
        of_padded = padded_operators.padded_gated_attention_backward
        dq, dk, dv, _, of_gate = of_padded(*flat, *saved, *of, *means, *gates)
        return [dq, dk, dv, None, of_gate]
    mask = TileMask() if plan.mask is None else plan.mask
    problem = Problem(q, k, v, bitmap, text_valid, *ints, plan.scale, plan.backend, *mask)
    tail: tuple[Tensor | None, ...] = means[1:] if plan.tail else ()
    if plan.tail and gate_coarse is None:
        means = Means(None, None, None)  # which are those of a coarse branch
    if gate_fine is None and gate_coarse is None:
        most = plan.kv_grid.num_tiles if plan.most is None else plan.most
        of_fine = operators.block_sparse_attention_backward
        if plan.tail:
            of_fine = operators.tail_attention_backward
        grads = of_fine(*flat, *saved, *problem, *tail, most)
    else:
        of_gated = operators.gated_attention_backward
        if plan.tail:
            of_gated = operators.gated_tail_attention_backward
        grads = of_gated(*flat, *saved, *problem, *tail, *means, *gates)
    each = zip(of_tokens, (*grads, None, None), strict=False)
    return [None if x is None or grad is None else grad.view(x.shape) for x, grad in each]


def flattened(x: Tensor) -> Tensor:
    """(B, S, heads, head_dim), a view wherever strides allow."""
    # No flatten: torch.autograd.grad with is_grads_batched has no rule for it.
    return x.reshape(x.shape[0], -1, *x.shape[4:]) if x.ndim == 6 else x
