# SPDX-License-Identifier: Apache-2.0
"""How far attention over a head's first n key tiles is from dense attention, for every n at once.

    out_n = sum_{i <= n} e_i o_i / sum_{i <= n} e_i    e_i = exp(lse_i)
    error_n = |gate * (out_n - out)|^2                 out: over all key tiles

o_i and lse_i are attention to key tile i alone, tiles in the order in which they would be chosen.
Two runs of tiles that follow each other are one run by the same formula, so a scan makes all out_n
in about log2(n) passes. Each run is divided by its own sum, so a tile whose weight is nothing
beside that of a later one does not become 0 / 0. Text is attended with any number of tiles, so it
is the beginning of every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends import torch_coarse
from vsa.diagnostics.dense import score_slices
from vsa.values.grid import Grid

COPIES = 5
"""Of the partial outputs, at most, that exist at a time."""


def error_by_count(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    order: Tensor,
    *,
    chosen: Tensor | None = None,
    gate: Tensor | None = None,
    text_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the attention output of video tokens with 1 to n key tiles.

    Args:
        q: (B, S, heads, head_dim), text included where the grid has some.
        k: (B, S, kv_heads, head_dim).
        v: like k.
        grid: of all of them.
        order: (B, heads, query tiles, n), key tiles in the order in which they are chosen.
        chosen: numbers of the query tiles, None for all.
        gate: (B, S, heads, head_dim), a factor of the output, or None.
        text_valid: (B, prefix + suffix) bool, which text tokens are real; None for all.

    Returns:
        errors (B, heads, n) and the square of the dense output (B, heads), each summed over
        channels, the mean over the tokens of the query tiles; fp32, or fp64 for fp64 inputs.
    """
    token = grid.tokens_of_tiles(q.device)
    rows = token if chosen is None else token[chosen]
    (batch, _, heads, head_dim), (n, slots) = q.shape, token.shape
    group = heads // k.shape[2]
    keys = grid.prefix + token.clamp(min=0)
    errors: Tensor | None = None
    for b, head, part, queries, scores in score_slices(q, k, grid, chosen, COPIES * head_dim):
        if errors is None:
            errors = scores.new_zeros(batch, heads, n)
            norms = scores.new_zeros(batch, heads)
        values = v[b, keys, head // group].to(scores.dtype)  # (n, slots, head_dim)
        lse, out = _each_tile(scores.view(-1, n, slots), values)
        # Tiles in their order, which a query tile's tokens share.
        at = order[b, head, part].repeat_interleave(slots, 0)
        lse = lse.gather(1, at)
        out = out.gather(1, at[..., None].expand_as(out))
        if grid.text:
            valid = None if text_valid is None else text_valid[b]
            first = _text(queries, k[b, :, head // group], v[b, :, head // group], grid, valid)
            lse, out = (torch.cat(each, 1) for each in zip(first, (lse, out), strict=True))
        out = _running(lse, out)[:, -n:]
        dense = out[:, -1:]
        off = out - dense
        if gate is not None:
            factor = gate[b, grid.prefix + rows[part].clamp(min=0).flatten(), head]
            off, dense = (x * factor.to(x.dtype)[:, None] for x in (off, dense))
        empty = (rows[part] < 0).flatten()[:, None]
        errors[b, head] += off.square().sum(-1).masked_fill(empty, 0).sum(0)
        norms[b, head] += dense.square().sum(-1).masked_fill(empty, 0).sum()
    assert errors is not None
    tokens = (rows >= 0).sum()
    return errors / tokens, norms / tokens


def _each_tile(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to every key tile alone.

    Args:
        scores: (queries, tiles, keys), minus infinity where there is no key.
        values: (tiles, keys, head_dim).

    Returns:
        lse (queries, tiles) and out (queries, tiles, head_dim); minus infinity and zeros for a
        tile without a key.
    """
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1)
    out = torch_coarse.product(weights.transpose(0, 1), values.mT, 1.0).transpose(0, 1)
    out = out / total.masked_fill(total == 0, 1)[..., None]
    return top[..., 0] + total.log(), out


def _text(
    queries: Tensor, k: Tensor, v: Tensor, grid: Grid, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention to the text alone, as ``_each_tile`` for one tile; k and v (S, head_dim)."""
    ends = grid.prefix, grid.prefix + grid.tokens
    k, v = (torch.cat((x[: ends[0]], x[ends[1] :])).to(queries.dtype) for x in (k, v))
    scores = torch_coarse.product(queries[None], k[None], queries.shape[-1] ** -0.5)[0]
    if valid is not None:  # masked tokens may hold anything, NaN included
        scores, v = scores.masked_fill(~valid, float("-inf")), v.masked_fill(~valid[:, None], 0)
    return _each_tile(scores[:, None], v[None])


def _running(lse: Tensor, out: Tensor) -> Tensor:
    """Attention to the first, the first two, to all runs of keys; lse (m, n), out (m, n, D)."""
    shift = 1
    while shift < lse.shape[1]:
        both = torch.logaddexp(lse[:, :-shift], lse[:, shift:])
        before = (lse[:, :-shift] - both).exp()[..., None]
        joined = torch.lerp(out[:, shift:], out[:, :-shift], before)
        lse = torch.cat((lse[:, :shift], both), 1)
        out = torch.cat((out[:, :shift], joined), 1)
        shift *= 2
    return out
