# SPDX-License-Identifier: Apache-2.0
"""The fine stage in plain PyTorch: gather the selected tiles and multiply.

One head after another, its query tiles in chunks of bounded memory, never a matrix of tokens by
tokens. Arithmetic is fp32 (fp64 for fp64 inputs), so this is also the yardstick for the kernels. A
slot without a token has the position -1: it reads and writes a spare last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import accumulation_dtype, real_tokens, slot_tokens
from vsa.values import bitmap
from vsa.values.grid import Grid
from vsa.values.problem import FineProblem, Saved, Upstream

THREAD_CHUNK_BYTES = 8 << 20
"""Scratch memory of a chunk per CPU thread: small for caches, large next to call overhead."""
LIST_BYTES = 64 << 20
"""Scratch memory for the lists of selected tiles, made for many chunks at once."""
CHUNK_BYTES = 256 << 20
"""Scratch memory of a chunk on other devices: enough work to fill them."""


def forward(problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.backends.base.Backend.forward``."""
    q, k, v = problem.q, problem.k, problem.v
    grid, kv_grid = problem.grids
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(
        q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q), device=q.device
    )
    real, key_real = real_tokens(problem)
    token, key_token = (slot_tokens(each, volume(each), q.device) for each in (grid, kv_grid))
    for batch, kv_head, heads in heads_of(q, k):
        keys = _KeyTiles.gather(
            k[batch, :, kv_head], v[batch, :, kv_head], key_token, key_real[batch % len(key_real)]
        )
        unreal = ~real[batch % len(real)]
        for head in heads:
            queries = _queries(q[batch, :, head], token, problem.scale)
            tile_out = queries.new_empty(*token.shape, q.shape[-1])
            tile_lse = queries.new_empty(token.shape)
            for rows, tile in keys.blocks_of(
                len(token), problem.bitmap[batch, head], kv_grid.num_tiles, most
            ):
                tile_out[rows], tile_lse[rows] = _attend(queries[rows], *keys.of(tile))
            out[batch, :, head] = to_sequence(tile_out, token, len(unreal)).masked_fill_(
                unreal[:, None], 0
            )
            lse[batch, head] = to_sequence(tile_lse, token, len(unreal)).masked_fill_(
                unreal, float("-inf")
            )
    return out, lse


def backward(
    upstream: Upstream, saved: Saved, problem: FineProblem, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``vsa.backends.base.Backend.backward``."""
    q, k, v = problem.q, problem.k, problem.v
    grid, kv_grid = problem.grids
    out, lse = saved
    grad_out, grad_lse = upstream
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _, key_real = real_tokens(problem)
    padded = problem.tile_sizes[0] is not None
    token, key_token = (slot_tokens(each, volume(each), q.device) for each in (grid, kv_grid))
    for batch, kv_head, heads in heads_of(q, k):
        keys = _KeyTiles.gather(
            k[batch, :, kv_head], v[batch, :, kv_head], key_token, key_real[batch % len(key_real)]
        )
        sums = _KeyGradients.zeros(keys)
        for head in heads:
            head_lse = lse[batch, head]
            # Tokens that attend nothing, invalid text among them: whatever lies in their rows, and
            # be it NaN, must not reach the keys that the others of their tile attend.
            idle = head_lse == float("-inf")
            head_grad = grad_out[batch, :, head].to(lse.dtype).masked_fill(idle[:, None], 0)
            # The gradient of lse enters where delta does: both multiply the probabilities.
            delta = (head_grad * out[batch, :, head]).sum(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[batch, head].masked_fill(idle, 0)
            queries = _queries(
                q[batch, :, head].masked_fill(idle[:, None], 0), token, problem.scale
            )
            grads, deltas, lses = (
                to_tiles(x, token) for x in (head_grad, delta, head_lse.masked_fill(idle, 0))
            )
            idle_rows = to_tiles(idle, token).bool()
            tile_dq = torch.empty_like(grads)
            for rows, tile in keys.blocks_of(
                len(token), problem.bitmap[batch, head], kv_grid.num_tiles, most
            ):
                tile_dq[rows], tile_dk, tile_dv = _attend_backward(
                    queries[rows],
                    *keys.of(tile),
                    grads[rows],
                    deltas[rows],
                    lses[rows],
                    # Idle rows of a video's tiles find padding alone, of the text's every key.
                    idle_rows[rows] if padded or rows.start >= grid.num_tiles else None,
                )
                sums.add(tile, tile_dk, tile_dv)
            dq[batch, :, head] = to_sequence(tile_dq, token, len(idle)).mul_(problem.scale)
        dk[batch, :, kv_head], dv[batch, :, kv_head] = (
            to_sequence(x, sums.token, k.shape[1]) for x in (sums.k, sums.v)
        )
    return dq, dk, dv


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of blocks.

    Args:
        q: (R, L_q, D + 1), from ``_queries``.
        k: (R, L_k, D + 1), from ``_KeyTiles``.
        v: (R, L_k, D).

    Returns:
        out (R, L_q, D) and lse (R, L_q).
    """
    scores = torch.bmm(q, k.mT)
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = _exp(scores.sub_(top))
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    out = torch.bmm(weights, v).div_(total.masked_fill_(total == 0, 1))
    # By the keys, not by the scores: those of a query that is NaN are NaN, masked or not.
    nothing = (k[..., -1] != 0).all(-1)
    return (
        out.masked_fill_(nothing[:, None, None], 0),
        lse.masked_fill_(nothing[:, None], float("-inf")),
    )


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    idle: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``_attend`` in q, k and v.

    lse (R, L_q) brings the probabilities back; rows of ``idle`` (R, L_q) bool have none.
    """
    weights = _exp(torch.bmm(q, k.mT).sub_(lse.unsqueeze(-1)))
    if idle is not None:
        weights.masked_fill_(idle.unsqueeze(-1), 0)
    dv = torch.bmm(weights.mT, grad)
    grad_scores = torch.bmm(grad, v.mT).sub_(delta.unsqueeze(-1)).mul_(weights)
    if idle is not None:
        grad_scores.masked_fill_(idle.unsqueeze(-1), 0)
    return torch.bmm(grad_scores, k[..., :-1]), torch.bmm(grad_scores.mT, q[..., :-1]), dv


def _exp(x: Tensor) -> Tensor:
    """In place, by way of exp2: on a CPU exp is many times slower where it underflows."""
    return x.mul_(1 / math.log(2)).exp2_()


@dataclass(frozen=True)
class _KeyTiles:
    """Keys and values of one head in tile order.

    The video's tiles, then the text's, then an empty one to pad rows with.

    One more channel of the keys is 0 where a slot holds a real token and -inf elsewhere. Queries
    have a 1 there, so that scores come out masked at no cost.

    Attributes:
        token: (tiles, V) int64, the position of every slot, -1 where there is none.
        k: (tiles, V, D + 1), zeros but for the last channel where there is no real token.
        v: (tiles, V, D), zeros where there is no real token.
    """

    token: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def gather(k: Tensor, v: Tensor, token: Tensor, real: Tensor) -> _KeyTiles:
        """From k and v (S, D), the positions (tiles, V) and which tokens are real (S,)."""
        token = functional.pad(token, (0, 0, 0, 1), value=-1)
        masked = ~functional.pad(real, (0, 1))[token].unsqueeze(-1)
        k, v = (to_tiles(x, token).masked_fill_(masked, 0) for x in (k, v))
        mask = torch.zeros_like(k[..., :1]).masked_fill_(masked, float("-inf"))
        return _KeyTiles(token, torch.cat((k, mask), dim=-1), v)

    def blocks_of(
        self, tiles: int, rows: Tensor, columns: int, most: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """``query_blocks`` over these keys."""
        return query_blocks(tiles, rows, columns, most, self.v)

    def of(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (R, K * V, D + 1) and values (R, K * V, D) of tiles (R, K)."""
        # index_select on whole rows copies tile by tile, which indexing does not.
        k, v = (
            x.flatten(1).index_select(0, tile.flatten()).view(len(tile), -1, x.shape[-1])
            for x in (self.k, self.v)
        )
        return k, v


@dataclass(frozen=True)
class _KeyGradients:
    """Gradients of one head's keys and values, summed in tile order.

    Attributes:
        token: (tiles, V) int64, the position of every slot.
        k: (tiles, V, D).
        v: (tiles, V, D).
    """

    token: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def zeros(keys: _KeyTiles) -> _KeyGradients:
        """Nothing summed yet."""
        return _KeyGradients(keys.token, torch.zeros_like(keys.v), torch.zeros_like(keys.v))

    def add(self, tile: Tensor, k: Tensor, v: Tensor) -> None:
        """Add k and v (R, K * V, D) to the tiles (R, K)."""
        for total, x in ((self.k, k), (self.v, v)):
            total.flatten(1).index_add_(0, tile.flatten(), x.view(tile.numel(), -1))


def query_blocks(
    tiles: int, rows: Tensor, columns: int, most: int, values: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of query tiles of one head and the key tiles (R, K) that each of their rows attends.

    Args:
        tiles: query tiles, the text's after the video's.
        rows: (n_q, words), the bitmap of the head.
        columns: key tiles of the video.
        most: upper bound of the tiles in a row.
        values: (key tiles, slots, channels): those of the video, of the text, and an empty one to
            pad rows with.
    """
    device, empty_tile = values.device, len(values) - 1
    tile_shape, element_size = (values.shape[1], values.shape[2]), values.element_size()
    text = torch.arange(columns, empty_tile, device=device)
    if device.type == "cpu":  # elsewhere the count would have to be waited for
        most = int(bitmap.unpack(rows, columns).sum(-1).max())
    step = _rows_per_chunk(max(1, most + len(text)), tile_shape, device, element_size)
    slab = step * max(1, LIST_BYTES // (8 * columns * step))
    for begin in range(0, len(rows), slab):
        chosen = bitmap.unpack(rows[begin : begin + slab], columns)
        lists = _indices(chosen, max(1, most), pad=empty_tile)
        lists = torch.cat((lists, text.expand(len(lists), -1)), dim=1)
        for first in range(0, len(lists), step):
            part = lists[first : first + step]
            yield slice(begin + first, begin + first + len(part)), part
    everything = torch.arange(empty_tile, device=device)[None]
    for row in range(len(rows), tiles):
        yield slice(row, row + 1), everything


def _indices(chosen: Tensor, most: int, pad: int) -> Tensor:
    """Set columns of each row, ascending, then ``pad``: (R, columns) bool -> (R, most) int64."""
    column = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    place = torch.where(chosen, chosen.cumsum(-1) - 1, most)
    return column.new_full((len(chosen), most + 1), pad).scatter_(1, place, column)[:, :most]


def _rows_per_chunk(
    tiles: int, tile_shape: tuple[int, int], device: torch.device, element_size: int
) -> int:
    """Query tiles whose keys, values and two matrices of scores fit a chunk's memory."""
    slots, channels = tile_shape
    row_bytes = tiles * slots * (2 * channels + 2 * slots) * element_size
    if device.type != "cpu":
        return max(1, CHUNK_BYTES // row_bytes)
    # A multiple of the threads: each multiplies whole query tiles.
    return torch.get_num_threads() * max(1, THREAD_CHUNK_BYTES // row_bytes)


def heads_of(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, range]]:
    """(batch, kv head, the query heads that share it)."""
    group = q.shape[2] // k.shape[2]
    for batch in range(q.shape[0]):
        for kv_head in range(k.shape[2]):
            yield batch, kv_head, range(kv_head * group, (kv_head + 1) * group)


def _queries(q: Tensor, token: Tensor, scale: float) -> Tensor:
    """Queries (S, D) at positions (tiles, V) -> (tiles, V, D + 1), scaled, and ones."""
    return functional.pad(to_tiles(q, token).mul_(scale), (0, 1), value=1.0)


def to_tiles(x: Tensor, token: Tensor) -> Tensor:
    """(S, ...) at positions (tiles, V) -> (tiles, V, ...) in the wide type, zeros at -1."""
    padded = x.new_empty(len(x) + 1, *x.shape[1:], dtype=accumulation_dtype(x))
    padded[:-1], padded[-1] = x, 0
    return padded.index_select(0, token.flatten() % len(padded)).view(*token.shape, *x.shape[1:])


def to_sequence(x: Tensor, token: Tensor, length: int) -> Tensor:
    """The inverse of ``to_tiles``: (tiles, V, ...) -> (length, ...)."""
    return x.new_empty(length + 1, *x.shape[2:]).index_put_((token,), x)[:-1]


def volume(grid: Grid) -> int:
    """Slots that a tile of this grid needs."""
    return grid.box[0] * grid.box[1] * grid.box[2]
