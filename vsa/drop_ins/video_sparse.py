# SPDX-License-Identifier: Apache-2.0
"""All of the attention over padded tiles: ``video_sparse_attn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsa.backends import named, torch_padded
from vsa.backends.tiles import accumulation_dtype
from vsa.drop_ins import planned
from vsa.drop_ins.inputs import Inputs, resolve, volume_of
from vsa.operators import coarse_select
from vsa.operators import padded as operators
from vsa.stages import eager, inputs
from vsa.stages.fine import fine_of_padded
from vsa.values import budget as budgets
from vsa.values import checks, padded
from vsa.values.budget import Budget, TopK
from vsa.values.problem import CoarseValues, Gates, Means, TileScores


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor | int | None = None,
    topk: TopK | None = None,
    block_size: int | tuple[int, int, int] = 64,
    compress_attn_weight: Tensor | None = None,
    *,
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Video Sparse Attention over padded tiles, in the call forms of FastVideo's kernels.

    A tile is a run of ``block_size`` slots, of which the first are real tokens, as many as its
    size says. What lies in the other slots, be it NaN, reaches no real token and no gradient.
    Unlike theirs, means and scores are fp32, and a tile without a token is never attended.
    Differentiable in q, k, v and compress_attn_weight; autocast and torch.compile work.

    Args:
        q: (B, heads, S_q, head_dim), S_q slots; bf16, fp16, fp32 or fp64; contiguous last
            dimension, any other strides.
        k: (B, kv_heads, S_k, head_dim); kv_heads divides heads.
        v: like k.
        variable_block_sizes: (n_k,) integers, real tokens of each key tile, 0 to ``block_size``.
        q_variable_block_sizes: (n_q,) integers, the same of the queries. None: those of the keys
            where q is as long as k, else all query rows are real.
        topk: key tiles per query tile, an int (clamped to their number), or whatever else
            ``vsa.attention`` takes.
        block_size: slots of a tile, 64, 128 or 256; or its sides (t, h, w).
        compress_attn_weight: factor of the coarse output, broadcastable to q. None is 1, as in
            their kernels; it does not leave the coarse output out.
        validate: read sizes on the host before any work, which waits for a GPU. False: the GPU
            checks them and stops at a wrong one; on a CPU they are always read.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        Like q, contiguous as (B, S_q, heads, head_dim); rows of padding are zeros.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    sizes, weight = q_variable_block_sizes, compress_attn_weight
    if isinstance(sizes, int):  # the older order, without the queries' sizes
        sizes, topk, block_size, weight = _older_order(sizes, topk, block_size, weight)
    if topk is None:
        raise TypeError("topk must say how many key tiles a query tile keeps, but it is None")
    if sizes is None and _as_long(q, k):
        sizes = variable_block_sizes
    numbers = planned.Numbers(sizes, variable_block_sizes)
    kind = planned.kind_of("video", q, k, v, weight, topk, numbers, block_size, backend, validate)
    plan = None if kind is None else eager.plan_of(kind)
    if plan is not None and plan.prepared is not None:
        return planned.of_choice(plan, (q, k, v), weight, numbers)
    call = resolve(
        q,
        k,
        v,
        volume=volume_of(block_size),
        sizes=sizes,
        kv_sizes=variable_block_sizes,
        gate=weight,
        validate=validate,
        backend=backend,
    )
    checks.gate("compress_attn_weight", weight, q)
    budget = budgets.resolve(topk, len(call.kv_sizes), call.q.shape[2])
    with torch.autocast(call.q.device.type, enabled=False):
        out = _attend(call, budget, weight).transpose(1, 2)
        if kind is not None and plan is None:
            gate = planned.gate_like(call.q.transpose(1, 2), weight)
            planned.remember(kind, call, (q, k, v), gate, budget, numbers, lse=False)
    return out


def _older_order(fifth: int, sixth: Any, seventh: Any, eighth: Tensor | None) -> Any:
    """The arguments from the fifth on, given as topk, block_size and compress_attn_weight.

    Any of them may come by keyword, and then stands in the place that it has in the newer order.
    """
    if sixth is None:
        return None, fifth, seventh, eighth
    return None, fifth, sixth, seventh if isinstance(seventh, Tensor) else eighth


def _as_long(q: object, k: object) -> bool:
    """Whether these are tensors of equal length; whatever else they may be is said later."""
    if not isinstance(q, Tensor) or not isinstance(k, Tensor):
        return False
    return q.ndim == k.ndim == 4 and q.shape[2] == k.shape[2]


def _attend(call: Inputs, budget: Budget, weight: Tensor | None) -> Tensor:
    """All stages on checked inputs; ``weight`` as the caller gave it."""
    who = named(call.backend)
    fused = who.fuses_gates and call.parts == 1
    means = _means(call, detached=fused)
    q_means, k_means, v_means = means
    queries, keys = torch_padded.without_empty(q_means, k_means, call.kv_sizes)
    scores = TileScores(
        queries.detach(),
        keys.detach(),
        None,
        budget.counts,
        budget.mass,
        budget.numbers,
        call.scale,
        call.backend,
    )
    if fused:
        chosen, coarse = coarse_select.select_and_attend(*scores, *CoarseValues(v_means))
        gate = planned.gate_like(call.q.transpose(1, 2), weight)
        gates = Gates(None, gate, coarse)
        problem = call.problem(chosen)
        if inputs.wants_gradients(call.q, call.k, call.v, gate):
            return operators.padded_gated_attention(*problem, *Means(*means), *gates)[0]
        return operators.padded_gated_attention_inference(*problem, *gates)[0]
    if "select" in who.composed:
        chosen = who.select(scores)[0]
    else:
        chosen = coarse_select.select_tiles(*scores)
    coarse = who.coarse_attention(queries, keys, v_means, call.scale)
    coarse = coarse.repeat_interleave(call.parts, dim=2)
    problem = call.problem(chosen)
    out, _ = fine_of_padded(problem)
    real = padded.real_slots(problem.sizes).view(1, -1, 1, 1)
    as_given = call.q.transpose(1, 2)
    gate = call.q.new_ones(1) if weight is None else weight.expand(as_given.shape).transpose(1, 2)
    # Zero times a gate is not zero where the gate of what is no token is NaN.
    gate = torch.where(real, gate.to(accumulation_dtype(call.q)), 0)
    grid = padded.grid_of(len(problem.sizes))
    return who.combine(out, coarse, None, gate, grid).masked_fill(~real, 0)


def _means(call: Inputs, detached: bool) -> list[Tensor]:
    """Means of the caller's tiles of q, k and v, (B, heads, n, head_dim) each."""
    xs = [x.detach() if detached else x for x in (call.q, call.k, call.v)]
    sides = [call.sizes, call.kv_sizes, call.kv_sizes]
    parts = [padded.sizes_of_parts(x, call.parts) for x in sides]
    who = named(call.backend)
    if "tile_means" in who.composed:
        means = who.padded_tile_means(xs, parts)
    else:
        means = operators.padded_tile_means(xs, parts, call.backend)
    if call.parts == 1:
        return means
    return [
        torch_padded.merged(mean, of, size, call.parts)
        for mean, of, size in zip(means, parts, sides, strict=True)
    ]
