# SPDX-License-Identifier: Apache-2.0
"""The specification over padded tiles: naive loops in fp64, as ``vsa.verify.reference``.

A tile is a run of ``volume`` slots, of which the first are real tokens, as many as its size says.
What the other slots hold is never looked at, so that it may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.verify.reference import best, softmax_attention


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    kv_sizes: Sequence[int],
    topk: float,
    volume: int = 64,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Coarse, select, fine and combine.

    Args:
        q: (B, heads, S_q, head_dim).
        k: (B, kv_heads, S_k, head_dim).
        v: like k.
        sizes: real tokens of each query tile.
        kv_sizes: of each key tile; one without any is no tile, neither for the coarse softmax nor
            for the choice.
        topk: key tiles per query tile, a number of them or a share of all.
        volume: slots of a tile.
        weight: factor of the coarse output, broadcastable to q; None is 1.

    Returns:
        out like q, zeros in padding, and the choice, (B, heads, n_q, n_k) bool; both in fp64.
    """
    batches, heads, _, head_dim = q.shape
    group = heads // k.shape[1]
    weight = torch.ones(1).expand(q.shape) if weight is None else weight.expand(q.shape)
    query_tiles, key_tiles = tiles_of(sizes, volume), tiles_of(kv_sizes, volume)
    there = [j for j, tokens in enumerate(key_tiles) if tokens]
    chosen = torch.zeros(batches, heads, len(sizes), len(kv_sizes), dtype=torch.bool)
    coarse_rows = {}
    for b in range(batches):
        for h in range(heads):
            queries, keys, values = (
                x.double() for x in (q[b, h], k[b, h // group], v[b, h // group])
            )
            k_means = [keys[key_tiles[j]].mean(0) for j in there]
            v_means = [values[key_tiles[j]].mean(0) for j in there]
            for i, tokens in enumerate(query_tiles):
                if not tokens or not there:
                    continue
                mean = queries[tokens].mean(0)
                scores = torch.stack([head_dim**-0.5 * mean @ other for other in k_means])
                coarse = scores.softmax(0) @ torch.stack(v_means)
                count = topk if isinstance(topk, int) else math.ceil(topk * len(kv_sizes))
                for place in best(scores.tolist(), max(1, count)):
                    chosen[b, h, i, there[place]] = True
                for token in tokens:
                    coarse_rows[b, h, token] = weight[b, h, token].double() * coarse
    fine, _ = block_sparse_attn(q, k, v, chosen, kv_sizes, volume, sizes)
    nothing = torch.zeros(head_dim, dtype=torch.float64)
    coarse_all = [
        coarse_rows.get((b, h, token), nothing)
        for b in range(batches)
        for h in range(heads)
        for token in range(q.shape[2])
    ]
    return fine + torch.stack(coarse_all).view(q.shape), chosen


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    kv_sizes: Sequence[int],
    volume: int = 64,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The fine stage alone.

    Args:
        q: (B, heads, S_q, head_dim).
        k: (B, kv_heads, S_k, head_dim).
        v: like k.
        kept: (B, heads, n_q, n_k) bool, the key tiles of every query tile.
        kv_sizes: real tokens of each key tile.
        volume: slots of a tile.
        sizes: real tokens of each query tile; None where all query rows are real.

    Returns:
        out like q, zeros in padding and where a row keeps nothing, and the log-sum-exp,
        (B, heads, S_q), -inf there; both in fp64.
    """
    batches, heads, slots, head_dim = q.shape
    group = heads // k.shape[1]
    query_tiles = tiles_of(sizes or [volume] * (slots // volume), volume)
    key_tiles = tiles_of(kv_sizes, volume)
    nothing = torch.zeros(head_dim, dtype=torch.float64)
    minus_infinity = torch.tensor(-math.inf, dtype=torch.float64)
    out_rows, lse_rows = [], []
    for b in range(batches):
        for h in range(heads):
            found = {}
            for i, tokens in enumerate(query_tiles):
                attended = [token for j in kept[b, h, i].nonzero() for token in key_tiles[int(j)]]
                keys, values = (x[b, h // group, attended].double() for x in (k, v))
                for token in tokens:
                    if attended:
                        found[token] = softmax_attention(
                            q[b, h, token].double(),
                            keys,
                            values,
                            [1] * len(attended),
                            head_dim**-0.5,
                        )
            rows = [found.get(token, (nothing, minus_infinity)) for token in range(slots)]
            out_rows += [out for out, _ in rows]
            lse_rows += [lse for _, lse in rows]
    return torch.stack(out_rows).view(q.shape), torch.stack(lse_rows).view(batches, heads, slots)


def tiles_of(sizes: Sequence[int], volume: int) -> list[list[int]]:
    """Slots of each tile's real tokens."""
    return [list(range(i * volume, i * volume + size)) for i, size in enumerate(sizes)]
