# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators, ``torch.ops.vsa.*``.

Names and schemas are stable, so that checkpointing policies can name them. Each has a fake
implementation (torch.compile), and the differentiable one an autograd and an autocast registration.
Grids travel as eight ints, see ``Grid.as_ints``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsa.backends import kernels, kernels_backward, pytorch, pytorch_routing, routing
from vsa.backends.layout import Plan, accumulation_dtype
from vsa.values import bitmap
from vsa.values.budget import counts_and_mass
from vsa.values.grid import Grid

_FORWARD = {"torch": pytorch.forward, "hopper": kernels.forward, "emulated": kernels.forward}
_BACKWARD = {
    "torch": pytorch.backward,
    "hopper": kernels_backward.backward,
    "emulated": kernels_backward.backward,
}


@torch.library.custom_op("vsa::tile_means", mutates_args=())
def tile_means(xs: Sequence[Tensor], grids: Sequence[int]) -> list[Tensor]:
    """Mean of the tokens of every tile; one launch for up to three tensors on a Hopper GPU.

    Args:
        xs: (B, length, heads, head_dim) each, any strides.
        grids: their grids, eight ints each.

    Returns:
        (B, heads, num_tiles, head_dim) each, fp32 (fp64 for fp64 inputs), contiguous.
    """
    each = _grids(grids)
    if routing.run_on(xs[0].device) and routing.can_mean(xs):
        return routing.tile_means(xs, each)
    return [pytorch_routing.tile_means(x, grid) for x, grid in zip(xs, each, strict=True)]


def _grids(ints: Sequence[int]) -> list[Grid]:
    return [Grid.from_ints(ints[start : start + 8]) for start in range(0, len(ints), 8)]


@tile_means.register_fake
def _(xs, grids):
    return [
        x.new_empty(x.shape[0], x.shape[2], grid.num_tiles, x.shape[3], dtype=accumulation_dtype(x))
        for x, grid in zip(xs, _grids(grids), strict=True)
    ]


def _save_types(ctx, inputs, output):
    xs, ctx.grids = inputs
    ctx.dtypes = [x.dtype for x in xs]
    ctx.set_materialize_grads(False)


def _spread_means(ctx, grads):
    each = zip(grads, _grids(ctx.grids), ctx.dtypes, strict=True)
    return [
        None if grad is None else pytorch_routing.spread_means(grad, *x) for grad, *x in each
    ], None


tile_means.register_autograd(_spread_means, setup_context=_save_types)


@torch.library.custom_op("vsa::select_tiles", mutates_args=())
def select_tiles(
    q_means: Tensor,
    k_means: Tensor,
    must: Tensor | None,
    topk: Sequence[int],
    scale: float,
    mass: float = 0.0,
    numbers: Tensor | None = None,
) -> Tensor:
    """The key tiles with the largest scores scale * q_means . k_means for every query tile.

    Tiles are taken in order: those of ``must``, then by falling score. Equal scores (+0 and -0 are
    equal) go to the lowest tile, NaN counts as the lowest score. A row stops when it has ``topk``
    tiles and they hold ``mass`` of the softmax over the row's scores (see ``vsa.TopP``), but not
    before all of ``must``. The matrix of tile scores exists only in slices of 64 MiB.

    Args:
        q_means: (B, heads, n_q, head_dim) fp32 or fp64.
        k_means: (B, kv_heads, n_k, head_dim).
        must: (n_q, n_k) bool, or None.
        topk: from 1 to n_k; one number for all query heads, or one each.
        scale: factor of the scores.
        mass: in [0, 1].
        numbers: stands for both ``topk`` and ``mass`` where they vary in compiled code, see
            ``vsa.values.budget.Budget``; (1 + one or heads,) fp64 on the CPU.

    Returns:
        (B, heads, n_q, words) int32.
    """
    counts, mass = counts_and_mass(topk, mass, numbers, k_means.shape[2])
    words, _ = _routing_of(q_means, counts).select(q_means, k_means, must, counts, scale, mass)
    return words


def _routing_of(means: Tensor, topk: Sequence[int]) -> Any:
    by_kernel = routing.run_on(means.device) and routing.can_select(means, topk)
    return routing if by_kernel else pytorch_routing


@select_tiles.register_fake
def _(q_means, k_means, must, topk, scale, mass=0.0, numbers=None):
    return q_means.new_empty(
        *q_means.shape[:3], bitmap.num_words(k_means.shape[2]), dtype=torch.int32
    )


@torch.library.custom_op("vsa::select_and_attend", mutates_args=())
def select_and_attend(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    must: Tensor | None,
    topk: Sequence[int],
    scale: float,
    mass: float = 0.0,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``select_tiles``, and the coarse attention out of the same scores.

    Args:
        q_means: as in ``select_tiles``, and so on.
        k_means: likewise.
        v_means: like k_means.
        must: likewise.
        topk: likewise.
        scale: likewise.
        mass: likewise.
        numbers: likewise.

    Returns:
        words: (B, heads, n_q, words) int32, the selection.
        coarse: (B, heads, n_q, head_dim), the type of the means, contiguous; without gradient.
    """
    counts, mass = counts_and_mass(topk, mass, numbers, k_means.shape[2])
    routing_of_means = _routing_of(q_means, counts)
    return routing_of_means.select(q_means, k_means, must, counts, scale, mass, v_means)


@select_and_attend.register_fake
def _(q_means, k_means, v_means, must, topk, scale, mass=0.0, numbers=None):
    words = q_means.new_empty(
        *q_means.shape[:3], bitmap.num_words(k_means.shape[2]), dtype=torch.int32
    )
    return words, q_means.new_empty(q_means.shape)


@torch.library.custom_op("vsa::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    grid: Sequence[int],
    kv_grid: Sequence[int],
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Exact attention over selected key tiles.

    Args:
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        words: (B, heads, n_q, words) int32, the selection's bitmap.
        text_valid: (B, prefix + suffix) bool or None for all valid.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        most: an upper bound of the tiles that a row keeps.
        scale: factor of the scores.
        backend: who computes it, never "auto".

    Returns:
        out: (B, S_q, heads, head_dim), contiguous; zeros where a token attends nothing.
        lse: (B, heads, S_q) fp32 (fp64 for fp64 inputs), natural logarithm; -inf where a token
            attends nothing.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    return _FORWARD[backend](q, k, v, words, text_valid, plan)


@block_sparse_attention.register_fake
def _(q, k, v, words, text_valid, grid, kv_grid, most, scale, backend):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=accumulation_dtype(q))


@torch.library.custom_op("vsa::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    grid: Sequence[int],
    kv_grid: Sequence[int],
    most: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``block_sparse_attention``.

    Args:
        grad_out: gradient of out, (B, S_q, heads, head_dim).
        grad_lse: gradient of lse, (B, heads, S_q), or None for zero.
        q: as the forward was given.
        k: likewise.
        v: likewise.
        out: as the forward returned.
        lse: likewise.
        words: as the forward was given.
        text_valid: likewise.
        grid: likewise.
        kv_grid: likewise.
        most: likewise.
        scale: likewise.
        backend: likewise.

    Returns:
        dq, dk, dv: like q, k and v, contiguous.
    """
    plan = Plan(Grid.from_ints(grid), Grid.from_ints(kv_grid), most, scale)
    return _BACKWARD[backend](grad_out, grad_lse, q, k, v, out, lse, words, text_valid, plan)


@block_sparse_attention_backward.register_fake
def _(
    grad_out, grad_lse, q, k, v, out, lse, words, text_valid, grid, kv_grid, most, scale, backend
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def once_only(ctx, *grads):
    """The gradient of a gradient: nobody has written it."""
    raise NotImplementedError(
        "vsa.attention has first derivatives only, but a second one is asked for: leave out "
        "create_graph=True, or use dense attention where gradients are differentiated"
    )


block_sparse_attention_backward.register_autograd(once_only)


def _save(ctx, inputs, output):
    q, k, v, words, text_valid, *ctx.plan = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, words, text_valid, *output)


def _differentiate(ctx, grad_out, grad_lse):
    q, k, v, words, text_valid, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, words, text_valid, *ctx.plan
    )
    return *grads, *[None] * 7


block_sparse_attention.register_autograd(_differentiate, setup_context=_save)


def _register_autocast(device: str, key: str) -> None:
    """Autocast's type for q, k and v; torch.library's own registration would fix one for good."""

    def cast_and_call(q, k, v, *rest):
        dtype = (
            q.dtype
            if torch.float64 in (q.dtype, k.dtype, v.dtype)
            else torch.get_autocast_dtype(device)
        )
        with torch.autocast(device, enabled=False):
            return torch.ops.vsa.block_sparse_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), *rest
            )

    _library.impl("block_sparse_attention", cast_and_call, key)


_library = torch.library.Library("vsa", "FRAGMENT")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
