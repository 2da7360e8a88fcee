# SPDX-License-Identifier: Apache-2.0
"""The specification, executable: naive loops in fp64 that follow the definition line by line.

Slow by intent and independent of the rest of the package: nothing here is shared with what it is
held against. Differentiable, so gradients come from the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: float | Sequence[float],
    *,
    mass: float = 0.0,
    grid: Sequence[int],
    tile: Sequence[int] = (4, 4, 4),
    prefix: int = 0,
    suffix: int = 0,
    kv_grid: Sequence[int] | None = None,
    kv_text: tuple[int, int] | None = None,
    gate_coarse: Tensor | None = None,
    gate_fine: Tensor | None = None,
    scale: float | None = None,
    runs: int = 1,
    mask: Tensor | None = None,
    text_valid: Tensor | None = None,
    tail: bool = False,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Video Sparse Attention.

    Args:
        q: (B, S_q, heads, head_dim).
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        topk: key tiles per query tile, int or share; or one of these per query head.
        mass: share of the coarse softmax that the kept tiles must hold as well.
        grid: (T, H, W) of the queries.
        tile: tokens per tile along (t, h, w).
        prefix: text tokens before the video of q, and of k unless ``kv_text`` says otherwise.
        suffix: text tokens after it.
        kv_grid: (T, H, W) of the keys where it differs.
        kv_text: (prefix, suffix) of the keys where they differ.
        gate_coarse: broadcastable to q, or None to leave the coarse output out.
        gate_fine: broadcastable to q, or None for 1.
        scale: factor of the scores, by default head_dim ** -0.5.
        runs: of a tile, whose means are scored for the choice; 1 for the mean of the tile.
        mask: (B, heads, n_q, n_k) bool, a choice of tiles instead of the top-k.
        text_valid: (B, prefix + suffix) bool.
        tail: whether each tile that a query tile did not pick is one key more for it, the tile's
            mean, that counts as often as the tile has tokens.
        allowed: (n_q, n_k) or (heads, n_q, n_k) bool, which key tiles a query tile may choose: no
            others take part in the coarse softmax, the choice or the tail. None for all.

    Returns:
        out (B, S_q, heads, head_dim), mask (B, heads, n_q, n_k) bool, lse (B, heads, S_q), all in
        fp64.
    """
    q, k, v = q.double(), k.double(), v.double()
    batches, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    group = heads // k.shape[2]
    kv_prefix, kv_suffix = (prefix, suffix) if kv_text is None else kv_text
    query_tiles = tiles_of(grid, tile, prefix)
    key_tiles = tiles_of(kv_grid or grid, tile, kv_prefix)
    chosen = torch.zeros(batches, heads, len(query_tiles), len(key_tiles), dtype=torch.bool)
    out_rows, lse_rows = {}, {}
    for b in range(batches):
        text_q, text_k = (
            [
                token
                for place, token in enumerate(positions)
                if text_valid is None or text_valid[b, place]
            ]
            for positions in (
                text_of(grid, prefix, suffix),
                text_of(kv_grid or grid, kv_prefix, kv_suffix),
            )
        )
        for h in range(heads):
            queries, keys, values = q[b, :, h], k[b, :, h // group], v[b, :, h // group]
            # coarse
            q_means = torch.stack([queries[tokens].mean(0) for tokens in query_tiles])
            k_means = torch.stack([keys[tokens].mean(0) for tokens in key_tiles])
            v_means = torch.stack([values[tokens].mean(0) for tokens in key_tiles])
            scores = scale * q_means @ k_means.T
            may = [
                list(range(len(key_tiles)))
                if allowed is None
                else allowed.expand(heads, -1, -1)[h, i].nonzero().flatten().tolist()
                for i in range(len(query_tiles))
            ]
            coarse = torch.stack(
                [scores[i, these].softmax(-1) @ v_means[these] for i, these in enumerate(may)]
            )
            if runs > 1:
                scores = sub_block_scores(queries, keys, query_tiles, key_tiles, runs, scale)
            for i, tokens in enumerate(query_tiles):
                # select
                each = topk[h] if isinstance(topk, Sequence) else topk
                picked = (
                    [may[i][place] for place in best(scores[i, may[i]].tolist(), each, mass)]
                    if mask is None
                    else mask[b, h, i].nonzero().flatten().tolist()
                )
                chosen[b, h, i, picked] = True
                # fine
                attended = [token for j in picked for token in key_tiles[j]] + text_k
                left_out = [j for j in may[i] if j not in picked] if tail else []
                attended_keys = torch.cat((keys[attended], k_means[left_out]))
                attended_values = torch.cat((values[attended], v_means[left_out]))
                counts = [1] * len(attended) + [len(key_tiles[j]) for j in left_out]
                for token in tokens:
                    fine, lse_rows[b, h, token] = softmax_attention(
                        queries[token], attended_keys, attended_values, counts, scale
                    )
                    out_rows[b, h, token] = combine(
                        fine, coarse[i], gate_fine, gate_coarse, q.shape, b, token, h
                    )
            everything = [token for tokens in key_tiles for token in tokens] + text_k
            for token in text_q:
                fine, lse_rows[b, h, token] = softmax_attention(
                    queries[token],
                    keys[everything],
                    values[everything],
                    [1] * len(everything),
                    scale,
                )
                out_rows[b, h, token] = combine(
                    fine, None, gate_fine, gate_coarse, q.shape, b, token, h
                )
    nothing, minus_infinity = q.new_zeros(head_dim), q.new_tensor(-math.inf)
    out = [
        out_rows.get((b, h, token), nothing)
        for b in range(batches)
        for token in range(length)
        for h in range(heads)
    ]
    lse = [
        lse_rows.get((b, h, token), minus_infinity)
        for b in range(batches)
        for h in range(heads)
        for token in range(length)
    ]
    return torch.stack(out).view(q.shape), chosen, torch.stack(lse).view(batches, heads, length)


def tiles_of(grid: Sequence[int], tile: Sequence[int], prefix: int) -> list[list[int]]:
    """Positions of each tile's tokens; tiles t-major, then h, then w, tokens in raster order."""
    (T, H, W), (tt, th, tw) = grid, tile
    return [
        [
            prefix + (t * H + h) * W + w
            for t in range(t0, min(t0 + tt, T))
            for h in range(h0, min(h0 + th, H))
            for w in range(w0, min(w0 + tw, W))
        ]
        for t0 in range(0, T, tt)
        for h0 in range(0, H, th)
        for w0 in range(0, W, tw)
    ]


def runs_of(tokens: Sequence[int], count: int) -> list[list[int]]:
    """The tokens of a tile in ``count`` runs as even as can be, longer ones first, none empty."""
    short, longer = divmod(len(tokens), count)
    runs, begin = [], 0
    for run in range(count):
        end = begin + short + (run < longer)
        runs += [list(tokens[begin:end])] if end > begin else []
        begin = end
    return runs


def sub_block_scores(
    queries: Tensor,
    keys: Tensor,
    query_tiles: Sequence[Sequence[int]],
    key_tiles: Sequence[Sequence[int]],
    runs: int,
    scale: float,
) -> Tensor:
    """Log sum_ab exp(scale * qc_a . kc_b) over the means of the runs a and b of two tiles.

    Args:
        queries: (S_q, head_dim) of one head.
        keys: (S_k, head_dim).
        query_tiles: positions of each tile's tokens.
        key_tiles: likewise.
        runs: of a tile.
        scale: factor of the products.

    Returns:
        (n_q, n_k).
    """
    q_means, k_means = (
        [torch.stack([x[run].mean(0) for run in runs_of(tokens, runs)]) for tokens in tiles]
        for x, tiles in ((queries, query_tiles), (keys, key_tiles))
    )
    rows = [
        torch.stack([(scale * q_runs @ k_runs.T).flatten().logsumexp(0) for k_runs in k_means])
        for q_runs in q_means
    ]
    return torch.stack(rows)


def text_of(grid: Sequence[int], prefix: int, suffix: int) -> list[int]:
    """Sequence positions of the text tokens."""
    video = math.prod(grid)
    return [*range(prefix), *range(prefix + video, prefix + video + suffix)]


def best(scores: Sequence[float], topk: float, mass: float = 0.0) -> list[int]:
    """The ``topk`` largest scores, and more until they hold ``mass`` of the softmax.

    Ties go to the lowest index. Returned in ascending order of index.
    """
    if not scores:
        return []
    count = (
        min(topk, len(scores)) if isinstance(topk, int) else max(1, math.ceil(topk * len(scores)))
    )
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    weights = [math.exp(scores[j] - scores[order[0]]) if mass else 1.0 for j in order]
    while count < len(order) and sum(weights[:count]) < mass * sum(weights):
        count += 1
    return sorted(order[:count])


def softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, counts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """One query (head_dim,) over keys and values (n, head_dim): output, log-sum-exp.

    Each of them counts as often as ``counts`` says: as if it stood there so many times.
    """
    if not counts:
        return query * 0, query.new_tensor(-math.inf)
    scores = scale * keys @ query + torch.tensor(counts, dtype=query.dtype).log()
    return scores.softmax(0) @ values, scores.logsumexp(0)


def combine(
    fine: Tensor,
    coarse: Tensor | None,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    shape: torch.Size,
    b: int,
    token: int,
    h: int,
) -> Tensor:
    """gate_fine * fine + gate_coarse * coarse for one token, each (head_dim,)."""
    out = fine if gate_fine is None else gate_fine.double().expand(shape)[b, token, h] * fine
    if coarse is not None and gate_coarse is not None:
        out = out + gate_coarse.double().expand(shape)[b, token, h] * coarse
    return out
