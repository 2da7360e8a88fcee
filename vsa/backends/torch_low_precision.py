# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits, simulated in PyTorch: the kernels' scales and roundings.

    int8   k = round((K - mean) / k_scale)   a scale for each tile, largest magnitude 127
           q = round(Q scale / q_scale)      a scale for each row, largest magnitude 127
    fp8    the same in e4m3, largest magnitude 16; their products are rounded to fp16, and q_scale
           is larger by q . q / (q . rounded q), which keeps a row's product with itself
    both   v = e4m3(V / v_scale)             a scale for each channel, largest magnitude 448
           w = line(q . k q_scale k_scale)   weights, e4m3; out = sum of w v v_scale / sum of w

``line`` is 2^x with a mantissa that is linear, the e4m3 code of 8 (x + 7), rounded. That is too
large by a factor from 1 to 1.061, 1.041 on average. The row's maximum stands at 1.75 x 2^7, where
the factor is the average, so that neither log-sum-exp nor sharp attention is biased. Weights enter
relative to the largest score that the row has seen so far, tile by tile in ascending order (kernels
may take tiles in another order). The softmax does not change when the same vector is subtracted
from all keys; the log-sum-exp gets q . mean back.

What is not simulated: sums of e4m3 products that the tensor cores cut off, which the kernels keep
to 8 tiles, about 0.1 % (csrc/prim/operand8.h).

Infinity and NaN do not fit into eight bits, and clamping would make numbers of them. So they become
NaN: of a query, for its row; of a key, for all that attend its tile; of a value, in its channel for
all that attend its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import slot_tokens, token_valid
from vsa.backends.torch_fine import (
    heads_of,
    query_blocks,
    to_sequence,
    to_tiles,
    volume,
)
from vsa.values.grid import SLOTS, Grid
from vsa.values.problem import Problem

MOST_S8, MOST_E4M3 = 127.0, 448.0
MOST_SCORED = 16.0
"""Largest magnitude of e4m3 operands of scores: 128 products of these stay below fp16's 65,504."""
LEAST = 2.0**-100
"""A tile or row whose numbers are all smaller than this is taken for zeros."""
TOP_CODE, TOP = 118.0, 224.0
"""The e4m3 code of the largest weight of a row, and what it stands for."""
SAMPLED = 16
"""Every so many rows of a tile enter the keys' mean, from the first on."""
MEAN_UNIT = 2.0**-24
MOST_IN_MEAN = 2.0**15
"""Larger magnitudes, infinity and NaN count as zeros there."""


def forward(problem: Problem, precision: str, most: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.backends.base.Backend.low_precision``."""
    q, k, v, text_valid = problem.q, problem.k, problem.v, problem.text_valid
    grid, kv_grid = problem.grids
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    real, key_real = (token_valid(text_valid, each, q.device) for each in (grid, kv_grid))
    token, key_token = slot_tokens(grid, volume(grid), q.device), key_slots(kv_grid, q.device)
    for batch, kv_head, heads in heads_of(q, k):
        keys = Keys.quantise(
            k[batch, :, kv_head],
            v[batch, :, kv_head],
            key_token,
            key_real[batch % len(key_real)],
            kv_grid,
            precision,
        )
        unreal = ~real[batch % len(real)]
        for head in heads:
            queries = to_tiles(q[batch, :, head], token).mul_(problem.scale)
            tile_out, tile_lse = torch.empty_like(queries), queries.new_empty(token.shape)
            for rows, tile in query_blocks(
                len(token), problem.bitmap[batch, head], kv_grid.num_tiles, most, keys.v
            ):
                tile_out[rows], tile_lse[rows] = _attend(queries[rows], keys.of(tile), precision)
            out[batch, :, head] = to_sequence(tile_out, token, len(unreal)).masked_fill_(
                unreal[:, None], 0
            )
            lse[batch, head] = to_sequence(tile_lse, token, len(unreal)).masked_fill_(
                unreal, -math.inf
            )
    return out, lse


def key_slots(grid: Grid, device: torch.device) -> Tensor:
    """Sequence position in every row of every tile, -1 where there is none.

    As the kernels cut them, since each tile has a scale: the video into whole tiles, text in runs
    of 64, those of the suffix apart from those of the prefix.
    """
    tile = grid.as_ints()[3:6]
    rows = SLOTS if grid.text else math.prod(tile)
    token = torch.full((grid.num_tiles, rows), -1, device=device)
    at = torch.arange(math.prod(tile), device=device).view(*tile)
    t, h, w = grid.box  # what of a tile a smaller video has
    token[:, at[:t, :h, :w].flatten()] = slot_tokens(grid, t * h * w, device)[: grid.num_tiles]
    parts = [token]
    for first, length in ((0, grid.prefix), (grid.prefix + grid.tokens, grid.suffix)):
        text = torch.arange(first, first + length, device=device)
        parts.append(functional.pad(text, (0, -length % rows), value=-1).view(-1, rows))
    return torch.cat(parts)


class Keys(NamedTuple):
    """Quantised keys and values of tiles, those of one head or those that rows attend.

    Attributes:
        k: (..., V, D), what was rounded, as fp32.
        k_scale: (...,), NaN where a key of the tile is infinite or NaN.
        v: (..., V, D), likewise; zeros where there is no real token.
        real: (..., V) bool.
        mean: (D,), what was subtracted from all keys.
        v_scale: (D,).
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    real: Tensor
    mean: Tensor
    v_scale: Tensor

    @staticmethod
    def quantise(
        k: Tensor, v: Tensor, token: Tensor, real: Tensor, grid: Grid, precision: str
    ) -> Keys:
        """Tiles of one head, an empty one after them.

        Args:
            k: (S, D), and so is ``v``.
            v: see k.
            token: (tiles, V), the position of every slot.
            real: (S,), which tokens are.
            grid: of the keys.
            precision: "int8" or "fp8".
        """
        token = functional.pad(token, (0, 0, 0, 1), value=-1)
        real = functional.pad(real, (0, 1))[token]
        k, v = (to_tiles(x, token).masked_fill_(~real.unsqueeze(-1), 0) for x in (k, v))
        mean = _mean(*(x[: grid.num_tiles, ::SAMPLED] for x in (k, real)))
        k = (k - mean).masked_fill_(~real.unsqueeze(-1), 0)
        k, k_scale = _rounded(k.flatten(1), precision)
        v, v_scale = _rounded_values(v.flatten(0, 1))
        return Keys(
            k.view(*token.shape, -1), k_scale, v.view(*token.shape, -1), real, mean, v_scale
        )

    def of(self, tile: Tensor) -> Keys:
        """Those of tiles (R, K)."""
        k, k_scale, v, real = (
            x.index_select(0, tile.flatten()).view(*tile.shape, *x.shape[1:]) for x in self[:4]
        )
        return Keys(k, k_scale, v, real, self.mean, self.v_scale)


def _mean(k: Tensor, real: Tensor) -> Tensor:
    """A vector near the mean of the real tokens: of numbers no larger than ``MOST_IN_MEAN``.

    Sums are of whole numbers, so that their order does not matter.
    """
    kept = torch.where((k.abs() <= MOST_IN_MEAN) & real.unsqueeze(-1), k, 0)
    total = (kept / MEAN_UNIT).round().long().flatten(0, 1).sum(0)
    return total.float() * MEAN_UNIT / real.sum().clamp(min=1)


def _rounded(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Rows (N, M) in units of a scale each (N,), which is NaN where a number is not finite."""
    top = MOST_S8 if precision == "int8" else MOST_SCORED
    most = x.abs().amax(-1)
    finite = most.isfinite()  # NaN is the largest
    most = torch.where(finite, most, 1).clamp(min=LEAST)
    units = torch.where(finite.unsqueeze(-1), x * _over(top, most).unsqueeze(-1), 0)
    codes = units.round_() if precision == "int8" else _e4m3(units)
    return codes, torch.where(finite, most / top, math.nan)


def _kept_product(x: Tensor, rounded: Tensor) -> Tensor:
    """What rows (N, D) that were rounded are multiplied by, (N,): x . x / (x . rounded)."""
    got = (x * rounded).sum(-1)
    return torch.where(got > 0, x.square().sum(-1) / got, 1)


def _rounded_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, D) in units of a scale for each channel (D,); NaN where they are not finite."""
    finite = v.isfinite()
    most = torch.where(finite, v, 0).abs().amax(0).clamp(min=LEAST)
    codes = _e4m3(torch.where(finite, v * _over(MOST_E4M3, most), math.nan))
    return codes, most / MOST_E4M3


def _over(top: float, most: Tensor) -> Tensor:
    """The quotient, rounded once: a number over a tensor would be a product with its reciprocal."""
    return torch.full_like(most, top) / most


def _e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers; clamped, since versions of PyTorch differ in what does not fit."""
    return x.clamp(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn).float()


def _attend(q: Tensor, keys: Keys, precision: str) -> tuple[Tensor, Tensor]:
    """Softmax attention of blocks.

    Args:
        q: (R, L, D), scaled.
        keys: of (R, K) tiles.
        precision: "int8" or "fp8".

    Returns:
        out (R, L, D) and lse (R, L).
    """
    rows, length, _ = q.shape
    codes, q_scale = _rounded(q.flatten(0, 1), precision)
    raw = torch.bmm(codes.view(q.shape), keys.k.flatten(1, 2).mT)
    if precision == "fp8":
        raw = raw.half().float()
        q_scale = q_scale * _kept_product(q.flatten(0, 1) / q_scale[:, None], codes)
    raw = raw.view(rows, length, *keys.real.shape[1:])
    factor = q_scale.view(rows, length, 1, 1) * keys.k_scale[:, None, :, None] / math.log(2)
    scores = raw * factor  # base 2
    scores.masked_fill_(~keys.real[:, None], -math.inf)
    lowest = torch.finfo(scores.dtype).min
    seen = scores.amax(-1, keepdim=True).clamp_(min=lowest).cummax(2).values  # NaN stays
    top = seen[:, :, -1:]
    weights = line(scores.sub_(seen)).mul_((seen - top).exp2_())
    total = weights.sum((2, 3))
    lse = (top.flatten(2).squeeze(-1) + (total / TOP).log2()) * math.log(2) + q @ keys.mean
    out = torch.bmm(weights.flatten(2), keys.v.flatten(1, 2)).mul_(keys.v_scale)
    out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))
    nothing = ~keys.real.flatten(1).any(-1)
    return (
        out.masked_fill_(nothing[:, None, None], 0),
        lse.masked_fill_(nothing[:, None], -math.inf),
    )


def line(x: Tensor) -> Tensor:
    """Weights for scores x up to 0, base 2, as e4m3 codes that are linear in x, as numbers.

    They stand to ``TOP`` as 2^x to 1.
    """
    # By way of fp16, as the kernels: once to its precision and once to whole numbers.
    code = (8 * x + TOP_CODE).clamp_(min=0).half().float().round_()
    exponent = (code / 8).floor_()
    return torch.where(code < 8, code * 2.0**-9, (1 + code / 8 - exponent) * (exponent - 7).exp2_())
