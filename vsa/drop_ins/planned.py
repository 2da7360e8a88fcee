# SPDX-License-Identifier: Apache-2.0
"""Calls over padded tiles that a backend has prepared, as ``vsa.stages.eager`` has for videos."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.backends import named
from vsa.drop_ins.inputs import Inputs, check_lists, check_sizes, is_readable
from vsa.stages import eager, planned
from vsa.stages.forms import Forms
from vsa.stages.inputs import DEFAULT_TILE, wants_gradients
from vsa.stages.planned import Plan
from vsa.stages.watchers import ALIGNMENT, PLAIN, address_of
from vsa.values import padded, transforms
from vsa.values.budget import Budget
from vsa.values.grid import SLOTS
from vsa.values.task import PaddedTiles, Task


class Numbers(NamedTuple):
    """What a call over padded tiles has besides q, k, v and a gate.

    Attributes:
        sizes: real tokens of the query tiles, None where all slots are.
        kv_sizes: real tokens of the key tiles.
        listed: lists or a map of what rows keep, None for a choice.
        counts: of lists.
    """

    sizes: Tensor | None
    kv_sizes: Tensor
    listed: Tensor | None = None
    counts: Tensor | None = None


def kind_of(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    topk: object,
    numbers: Numbers,
    block_size: object,
    backend: object,
    validate: object,
) -> Hashable | None:
    """All that a call depends on besides the numbers in its tensors; None if it has no plan.

    Args:
        name: of the function.
        q: as the caller gave it, and so are all the others.
        k: see q.
        v: see q.
        gate: see q.
        topk: see q.
        numbers: see q.
        block_size: see q.
        backend: see q.
        validate: see q; whoever reads numbers on the host has no plan.
    """
    if torch.compiler.is_compiling() or validate is not False or not _is_exact(block_size):
        return None
    layouts: list[object] = [name, block_size]
    for x in numbers:
        if x is None:
            layouts.append(None)
        elif not isinstance(x, Tensor) or not address_of(x):
            return None
        else:
            layouts += (*planned.layout(x), transforms.must_be_copied(x))
    if torch.is_grad_enabled() and eager.is_hooked():  # hooks see what the operators save
        return None
    rest = None, None, DEFAULT_TILE, None, backend, "mean", False, False, False, None, "native"
    tensors = (q, k, v) if gate is None else (q, k, v, gate)
    if not all(type(x) in PLAIN for x in tensors):
        return None
    return eager.kind_of(q, k, v, None, gate, None, None, topk, rest, tuple(layouts))


def _is_exact(block_size: object) -> bool:
    """Whether a block size that is equal to this one means the same."""
    sides = block_size if type(block_size) is tuple else (block_size,)
    return {*map(type, sides)} <= {int}


def gate_like(q: Tensor, weight: Tensor | None) -> Tensor:
    """compress_attn_weight as (B, S_q, heads, head_dim), a view where its type allows; 1 for None.

    One that is broadcast and wants a gradient goes in fp32, so that the terms of that gradient's
    sum are not rounded.

    Args:
        q: (B, heads, S_q, head_dim) in the type of the kernels.
        weight: broadcastable to it.
    """
    if weight is None:
        return q.new_ones(1).expand(q.shape).transpose(1, 2)
    sums = wants_gradients(weight) and (weight.shape != q.shape or 0 in weight.stride())
    weight = weight.float() if sums or weight.dtype != q.dtype else weight
    return weight.expand(q.shape).transpose(1, 2)


def remember(
    key: Hashable,
    call: Inputs,
    given: Sequence[Tensor],
    gate: Tensor | None,
    budget: Budget | None,
    numbers: Numbers,
    lse: bool,
) -> None:
    """Prepare the next calls of a kind, if its backend can.

    Args:
        key: of ``kind_of``.
        call: the checked inputs of the first call.
        given: q, k and v as the caller gave them.
        gate: of ``gate_like``, or None without a coarse branch.
        budget: of a choice.
        numbers: as the caller gave them.
        lse: whether the log-sum-exp is a result.
    """
    cast = call.q.dtype if any(x.dtype != call.q.dtype for x in given) else None
    q, k, v, *_ = tokens = _tokens(cast, given)
    others = _readable(numbers)
    counts: Sequence[int] = ()
    mass, is_constant = 0.0, True
    if budget is not None:
        counts, mass, is_constant = tuple(budget.counts), budget.mass, budget.numbers is None
    is_map = numbers.listed is not None and numbers.listed.dtype is torch.bool
    grids = [padded.grid_of(len(of) * call.parts) for of in (call.sizes, call.kv_sizes)]
    gradients = wants_gradients(*given, gate)
    prepared = None
    if is_constant and (call.parts == 1 or numbers.listed is not None):
        task = Task(
            q=q,
            k=k,
            v=v,
            gate_fine=None,
            gate_coarse=gate,
            text_valid=None,
            bitmap=None,
            grid=grids[0],
            kv_grid=grids[1],
            counts=counts,
            mass=mass,
            runs=1,
            scale=call.scale,
            gradients=gradients,
            gives_lse=lse,
            gives_bitmap=False,
            misaligned=(_is_misaligned(q), _is_misaligned(k), _is_misaligned(v)),
            padded=PaddedTiles(
                others.sizes,
                others.kv_sizes,
                None if is_map else others.listed,
                others.counts,
                others.listed if is_map else None,
                call.parts,
            ),
        )
        prepared = named(call.backend).prepare(task)
    layouts = tuple(
        None if x is None else (planned.layout(x),) * 2
        for x in (*tokens, None, gate, None, None, *others)
    )
    forms = Forms(cast, (False, False, False), (False, gate is not None))
    eager.keep(
        key,
        Plan(
            prepared,
            grids[0],
            grids[1],
            None,
            call.scale,
            call.backend,
            gradients,
            layouts,
            forms,
            everything=False,
            hooked=False,
            tail=False,
            mask=None,
            parts=call.parts,
        ),
    )


def of_choice(
    plan: Plan, given: Sequence[Tensor], weight: Tensor | None, numbers: Numbers
) -> Tensor:
    """Run a plan of ``video_sparse_attn``: out as q.

    Args:
        plan: of calls like this one.
        given: q, k and v as the caller gave them.
        weight: compress_attn_weight.
        numbers: as the caller gave them.
    """
    if is_readable(numbers.kv_sizes):
        volume = plan.parts * SLOTS
        if numbers.sizes is not None:
            check_sizes("q_variable_block_sizes", numbers.sizes, volume, validate=False)
        check_sizes("variable_block_sizes", numbers.kv_sizes, volume, validate=False)
    return _run(plan, given, weight, numbers)[0]


def of_given(plan: Plan, given: Sequence[Tensor], numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Run a plan of tiles that are given: out as q, and lse."""
    kv_sizes = numbers.kv_sizes
    if is_readable(kv_sizes):
        check_sizes("variable_block_sizes", kv_sizes, plan.parts * SLOTS, validate=False)
        if numbers.listed is not None and numbers.counts is not None:
            check_lists(numbers.listed, numbers.counts, len(kv_sizes), validate=False)
    out, lse = _run(plan, given, None, numbers)
    assert lse is not None
    return out, lse


def _run(
    plan: Plan, given: Sequence[Tensor], weight: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor | None]:
    q = given[0]
    with torch.autocast(q.device.type, enabled=False):
        tokens = _tokens(plan.forms.cast, given)
        gate = None
        if plan.forms.broadcast[1]:
            gate = gate_like(tokens[0].transpose(1, 2), weight)
        tensors = *tokens, None, gate, None, None, *_readable(numbers)
        out, lse, _ = planned.run(plan, tensors)
    return out.transpose(1, 2), lse


def _is_misaligned(x: Tensor) -> bool:
    """Whether kernels cannot read a tensor where it is."""
    return x.data_ptr() % ALIGNMENT != 0


def _tokens(cast: torch.dtype | None, given: Sequence[Tensor]) -> list[Tensor]:
    """q, k and v, (B, S, heads, head_dim), in one type."""
    return [(x if cast is None else x.to(cast)).transpose(1, 2) for x in given]


def _readable(numbers: Numbers) -> Numbers:
    """Numbers as kernels read them: int32 but for a map, contiguous, and such as autograd keeps."""
    sizes, kv_sizes, listed, counts = numbers
    return Numbers(
        None if sizes is None else _readable_one(sizes),
        _readable_one(kv_sizes),
        None if listed is None else _readable_one(listed),
        None if counts is None else _readable_one(counts),
    )


def _readable_one(x: Tensor) -> Tensor:
    x = x if x.dtype in (torch.bool, torch.int32) else x.to(torch.int32)
    return transforms.savable(x.contiguous())
