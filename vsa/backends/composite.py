# SPDX-License-Identifier: Apache-2.0
"""The fine stage of PyTorch's own operators: any derivative of any order, at more memory.

For tensors with a forward-mode tangent or inside of torch.func, see ``vsa.values.transforms``.
Arithmetic is that of the ``torch`` backend: fp32 (fp64 for fp64 inputs), the selected tiles
gathered, sparse in cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.layout import Plan, accumulation_dtype, slot_tokens, token_valid
from vsa.backends.pytorch import query_blocks
from vsa.values.grid import Grid


def forward(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, text_valid: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention``."""
    with torch.autocast(q.device.type, enabled=False):  # operators of our own are not reached by it
        return _forward(q, k, v, words, text_valid, plan)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, text_valid: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.to(accumulation_dtype(x)) for x in (q, k, v))
    token, key_token = (_positions(grid, q.device) for grid in (plan.grid, plan.kv_grid))
    key_token = functional.pad(key_token, (0, 0, 0, 1), value=-1)  # an empty tile, to pad rows with
    real, key_real = (token_valid(text_valid, grid, q.device) for grid in (plan.grid, plan.kv_grid))
    slot = _slots(token, plan.grid.length)
    outs, lses = [], []
    for batch in range(q.shape[0]):
        masked = ~functional.pad(key_real[batch % len(key_real)], (0, 1))[key_token]
        queries = q[batch].masked_fill(~real[batch % len(real)][:, None, None], 0)
        of_heads = [
            _attend(
                _gather(queries[:, head], token) * plan.scale,
                _gather(k[batch, :, head // group], key_token).masked_fill(masked[..., None], 0),
                _gather(v[batch, :, head // group], key_token).masked_fill(masked[..., None], 0),
                masked,
                words[batch, head],
                plan,
            )
            for head in range(q.shape[2])
        ]
        outs.append(torch.stack([out.flatten(0, 1)[slot] for out, _ in of_heads], dim=1))
        lses.append(torch.stack([lse.flatten()[slot] for _, lse in of_heads]))
    out = torch.stack(outs).masked_fill(~real[:, :, None, None], 0)
    lse = torch.stack(lses).masked_fill(~real[:, None], float("-inf"))
    return out.to(dtype), lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, words: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """One head in tile order: q (tiles, V, D), k and v (key tiles, W, D), masked (key tiles, W)."""
    outs, lses = [], []
    for rows, tile in query_blocks(
        len(q), words, plan, len(k), (v.shape[1], v.shape[2]), v.device, v.element_size()
    ):
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
