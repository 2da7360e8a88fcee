# SPDX-License-Identifier: Apache-2.0
"""The fine stage alone over padded tiles, from a map or from lists of key tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.drop_ins import planned
from vsa.drop_ins.inputs import (
    Inputs,
    check_device,
    check_integers,
    check_lists,
    resolve,
    volume_by,
)
from vsa.stages import eager
from vsa.stages.fine import fine_of_padded
from vsa.values import bitmap


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    variable_block_sizes: Tensor,
    *,
    validate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over padded tiles that a map keeps, in the call form of FastVideo's kernels.

    A tile has 64, 128 or 256 slots, as the lengths of q and of the map say. All query rows are
    real; of the keys the first slots of a tile are, as many as its size says. What lies in the
    others, be it NaN, reaches nothing. Differentiable in q, k and v.

    Args:
        q: (B, heads, S_q, head_dim), S_q slots; bf16, fp16, fp32 or fp64; contiguous last
            dimension, any other strides.
        k: (B, kv_heads, S_k, head_dim); kv_heads divides heads, S_k may differ from S_q.
        v: like k.
        block_map: (B, heads, n_q, n_k) bool, the key tiles that each query tile keeps; rows may
            keep different numbers.
        variable_block_sizes: (n_k,) integers, real tokens of each key tile, 0 to the tile's slots.
        validate: read numbers in tensors on the host before any work, which waits for a GPU. False:
            the GPU checks them and stops at a wrong one; on a CPU they are always read.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out: like q; zeros where a row keeps nothing.
        lse: (B, heads, S_q) fp32 (fp64 for fp64 inputs), natural logarithm, differentiable; -inf
            where a row keeps nothing.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    numbers = planned.Numbers(None, variable_block_sizes, block_map)
    kind = planned.kind_of("map", q, k, v, None, 1, numbers, (), backend, validate)
    plan = None if kind is None else eager.plan_of(kind)
    if plan is not None and plan.prepared is not None:
        return planned.of_given(plan, (q, k, v), numbers)
    if not isinstance(block_map, Tensor) or block_map.dtype is not torch.bool:
        kind = block_map.dtype if isinstance(block_map, Tensor) else type(block_map).__name__
        raise TypeError(f"block_map must be a bool tensor, but it is {kind}")
    call = _resolve("block_map", block_map, q, k, v, variable_block_sizes, validate, backend)
    wanted = (*_rows(call), len(call.kv_sizes))
    if tuple(block_map.shape) != wanted:
        raise ValueError(
            f"block_map must be (B, heads, n_q, n_k) = {wanted}, but its shape is "
            f"{tuple(block_map.shape)}"
        )
    check_device("block_map", block_map, q.device)
    found = _attend(call, block_map)
    if kind is not None and plan is None:
        planned.remember(kind, call, (q, k, v), None, None, numbers, lse=True)
    return found


def block_sparse_attn_from_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor,
    *,
    validate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``block_sparse_attn`` from lists of key tiles in place of a map.

    Args:
        q: as in ``block_sparse_attn``, and so are k, v and variable_block_sizes.
        k: see q.
        v: see q.
        q2k_idx: (B, heads, n_q, width) integers: in each row as many key tiles as ``q2k_num`` says,
            in any order; what stands after them is not read. One that is named twice counts once.
        q2k_num: (B, heads, n_q) integers, 0 to width; rows may differ.
        variable_block_sizes: (n_k,) integers, real tokens of each key tile.
        validate: as in ``block_sparse_attn``; of the lists, counts and indices are checked.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out and lse, as ``block_sparse_attn``.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    lists, counts = q2k_idx, q2k_num
    numbers = planned.Numbers(None, variable_block_sizes, lists, counts)
    kind = planned.kind_of("lists", q, k, v, None, 1, numbers, (), backend, validate)
    plan = None if kind is None else eager.plan_of(kind)
    if plan is not None and plan.prepared is not None:
        return planned.of_given(plan, (q, k, v), numbers)
    call = _resolve("q2k_idx", lists, q, k, v, variable_block_sizes, validate, backend)
    check_integers("q2k_idx", lists, q.device)
    check_integers("q2k_num", counts, q.device)
    rows = _rows(call)
    if lists.ndim != 4 or tuple(lists.shape[:3]) != rows:
        raise ValueError(
            f"q2k_idx must be (B, heads, n_q, width) with (B, heads, n_q) = {rows}, but its shape "
            f"is {tuple(lists.shape)}"
        )
    if tuple(counts.shape) != rows:
        raise ValueError(
            f"q2k_num must be (B, heads, n_q) = {rows}, but its shape is {tuple(counts.shape)}"
        )
    columns = len(call.kv_sizes)
    listed = check_lists(lists, counts, columns, validate)
    # One more column takes what is not listed.
    column = torch.where(listed, lists.to(torch.int64).clamp(0, columns - 1), columns)
    kept = torch.zeros(*rows, columns + 1, dtype=torch.bool, device=q.device)
    found = _attend(call, kept.scatter_(-1, column, True)[..., :columns])
    if kind is not None and plan is None:
        planned.remember(kind, call, (q, k, v), None, None, numbers, lse=True)
    return found


def _resolve(
    name: str,
    rows: object,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    validate: bool,
    backend: str,
) -> Inputs:
    """Checked inputs, where ``rows`` (B, heads, n_q, ...) says how many slots a tile has."""
    volume = 64
    if isinstance(rows, Tensor) and rows.ndim == 4 and isinstance(q, Tensor) and q.ndim == 4:
        volume = volume_by(name, rows.shape[2], "q", q.shape[2])
    return resolve(
        q,
        k,
        v,
        volume=volume,
        sizes=None,
        kv_sizes=variable_block_sizes,
        validate=validate,
        backend=backend,
    )


def _rows(call: Inputs) -> tuple[int, int, int]:
    """(B, heads, n_q)."""
    return call.q.shape[0], call.q.shape[2], len(call.sizes)


def _attend(call: Inputs, kept: Tensor) -> tuple[Tensor, Tensor]:
    """From (B, heads, n_q, n_k) bool."""
    with torch.autocast(call.q.device.type, enabled=False):
        out, lse = fine_of_padded(call.problem(bitmap.pack(kept)))
    return out.transpose(1, 2), lse
