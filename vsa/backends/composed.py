# SPDX-License-Identifier: Apache-2.0
"""The fine stage of PyTorch's own operators: any derivative of any order, at more memory.

For tensors with a forward-mode tangent or inside of torch.func, see ``vsa.values.transforms``.
Arithmetic is that of the ``torch`` backend: fp32 (fp64 for fp64 inputs), the selected tiles
gathered, sparse in cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import accumulation_dtype, real_tokens, slot_tokens
from vsa.backends.torch_coarse import for_query_heads, without_unseen
from vsa.backends.torch_fine import query_blocks
from vsa.values.grid import Grid
from vsa.values.problem import FineProblem
from vsa.values.tile_mask import TileMask


def coarse_attention(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    scale: float,
    mask: TileMask | None = None,
) -> Tensor:
    """Arguments and result as in ``vsa.stages.coarse.coarse_attention``."""
    if mask is not None:
        q_means, k_means, v_means = without_unseen(mask, q_means, k_means, v_means)
    k_means, v_means = for_query_heads(q_means, k_means, v_means)
    scores = (q_means @ k_means.mT) * scale
    if mask is None:
        return scores.softmax(-1) @ v_means
    hidden = ~mask.matrix(q_means.shape[2], q_means.device)
    nothing = hidden.all(-1, keepdim=True)  # a softmax over nothing would be NaN
    weights = scores.masked_fill(hidden & ~nothing, float("-inf")).softmax(-1)
    return weights.masked_fill(nothing, 0) @ v_means


def forward(problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.backends.base.Backend.forward``."""
    # Autocast does not reach operators of our own, and must not reach what stands in for them.
    with torch.autocast(problem.q.device.type, enabled=False):
        return _forward(problem, most)


def _forward(problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    grid, kv_grid = problem.grids
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.to(accumulation_dtype(x)) for x in (q, k, v))
    token, key_token = (_positions(each, q.device) for each in (grid, kv_grid))
    key_token = functional.pad(key_token, (0, 0, 0, 1), value=-1)  # an empty tile, to pad rows with
    real, key_real = real_tokens(problem)
    slot = _slots(token, grid.length)
    key_slots = v.new_empty(1, 1, v.shape[-1]).expand(*key_token.shape, -1)  # shape and type alone
    outs, lses = [], []
    for batch in range(q.shape[0]):
        masked = ~functional.pad(key_real[batch % len(key_real)], (0, 1))[key_token]
        queries = q[batch].masked_fill(~real[batch % len(real)][:, None, None], 0)
        of_heads = [
            _attend(
                _gather(queries[:, head], token) * problem.scale,
                _gather(k[batch, :, head // group], key_token).masked_fill(masked[..., None], 0),
                _gather(v[batch, :, head // group], key_token).masked_fill(masked[..., None], 0),
                masked,
                query_blocks(
                    len(token), problem.bitmap[batch, head], kv_grid.num_tiles, most, key_slots
                ),
            )
            for head in range(q.shape[2])
        ]
        outs.append(torch.stack([out.flatten(0, 1)[slot] for out, _ in of_heads], dim=1))
        lses.append(torch.stack([lse.flatten()[slot] for _, lse in of_heads]))
    out = torch.stack(outs).masked_fill(~real[:, :, None, None], 0)
    lse = torch.stack(lses).masked_fill(~real[:, None], float("-inf"))
    return out.to(dtype), lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masked: Tensor,
    blocks: Iterator[tuple[slice, Tensor]],
) -> tuple[Tensor, Tensor]:
    """One head in tile order: q (tiles, V, D), k and v (key tiles, W, D), masked (key tiles, W)."""
    outs, lses = [], []
    for rows, tile in blocks:
        keys, values = (x[tile].flatten(1, 2) for x in (k, v))
        hidden = masked[tile].flatten(1)[:, None]
        scores = (q[rows] @ keys.mT).masked_fill(hidden, float("-inf"))
        nothing = hidden.all(-1, keepdim=True)  # a softmax over nothing would be NaN
        lse = scores.masked_fill(nothing, 0).logsumexp(-1, keepdim=True)
        weights = (scores.masked_fill(nothing, 0) - lse).exp().masked_fill(hidden, 0)
        outs.append((weights @ values).masked_fill(nothing, 0))
        lses.append(lse.masked_fill(nothing, float("-inf")).squeeze(-1))
    return torch.cat(outs), torch.cat(lses)


def _positions(grid: Grid, device: torch.device) -> Tensor:
    return slot_tokens(grid, grid.box[0] * grid.box[1] * grid.box[2], device)


def _gather(x: Tensor, token: Tensor) -> Tensor:
    """(S, D) at positions (tiles, V) -> (tiles, V, D), zeros at -1."""
    return functional.pad(x, (0, 0, 0, 1))[token]


def _slots(token: Tensor, length: int) -> Tensor:
    """Where each token lies among the slots of all tiles."""
    slot = torch.arange(token.numel(), device=token.device).view_as(token)
    return slot.new_empty(length + 1).index_put((token,), slot)[:-1]
