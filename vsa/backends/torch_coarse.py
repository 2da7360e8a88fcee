# SPDX-License-Identifier: Apache-2.0
"""Means and selection in plain PyTorch, for any device and for fp64.

It is also the yardstick of the kernels: on identical scores the bitmaps are identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.tiles import accumulation_dtype
from vsa.backends.torch_kept_tiles import kept_tiles
from vsa.values import bitmap
from vsa.values.grid import Grid
from vsa.values.problem import TileScores
from vsa.values.tile_mask import TileMask, spend

SCORE_BYTES = 64 << 20
"""Scores of tile means that exist at a time."""
SORT_BYTES = 8 << 20
"""Likewise where whole rows are sorted, which takes many times the memory of the scores."""


def tile_means(x: Tensor, grid: Grid) -> Tensor:
    """Mean of the tokens of every tile, straight from the raster layout.

    Args:
        x: (B, length, heads, head_dim), any strides; text tokens take no part.
        grid: the grid of x.

    Returns:
        (B, heads, num_tiles, head_dim), fp32 or wider, contiguous.
    """
    video = x[:, grid.prefix : grid.prefix + grid.tokens].unflatten(1, grid.shape)
    for axis, size in reversed(list(enumerate(grid.box, start=1))):
        video = _sum_boxes(video, axis, size)
    sizes = grid.tile_sizes(x.device)[:, None, None]
    return (video.flatten(1, 3) / sizes).transpose(1, 2).contiguous()


def _sum_boxes(x: Tensor, axis: int, size: int) -> Tensor:
    """Sums of ``size`` neighbours along ``axis``; the last one takes what is left."""
    dtype = accumulation_dtype(x)
    whole = x.shape[axis] // size * size
    sums = (
        x.narrow(axis, 0, whole).unflatten(axis, (whole // size, size)).sum(axis + 1, dtype=dtype)
    )
    if whole == x.shape[axis]:
        return sums
    rest = x.narrow(axis, whole, x.shape[axis] - whole).sum(axis, keepdim=True, dtype=dtype)
    return torch.cat((sums, rest), axis)


def spread_means(grads: Sequence[Tensor], grid: Grid, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of ``tile_means``: each token gets its tile's, over the tile's size.

    Rounded to the final type while they are small, and then written once: what a kernel of its own
    would do.

    Args:
        grads: (B, heads, num_tiles, head_dim) each, on one device.
        grid: of all x.
        dtype: of all x.

    Returns:
        (B, length, heads, head_dim) each, zeros at text tokens.
    """
    sizes = grid.tile_sizes(grads[0].device)[:, None]
    tile = grid.tile_of_token(grads[0].device)
    if grid.text:
        tile = functional.pad(tile, (grid.prefix, grid.suffix), value=grid.num_tiles)
    spread = []
    for grad in grads:
        rows = (grad / sizes).to(dtype).transpose(1, 2)
        if grid.text:  # one more row, of zeros
            rows = functional.pad(rows, (0, 0, 0, 0, 0, 1))
        spread.append(rows.index_select(1, tile))
    return spread


@dataclass(frozen=True)
class ScoreSlice:
    """Scores of some rows.

    Query heads that share a key head are rows of one matrix, of B * kv_heads matrices.

    Attributes:
        first: number of the first row among those of (B, heads, n_q).
        matrices: whose rows these are.
        rows: which ones of each.
        scores: (matrices, rows, n_k), contiguous.
    """

    first: int
    matrices: slice
    rows: slice
    scores: Tensor


Product = Callable[[Tensor, Tensor, float], Tensor]


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Of matrices, in full precision whatever the process allows elsewhere (TF32, bf16).

    Args:
        left: (matrices, rows, depth).
        right: (matrices, columns, depth).
        scale: a factor.

    Returns:
        (matrices, rows, columns).
    """
    unused = left.new_empty(1, 1, 1)
    with full_precision(left.device):
        return torch.baddbmm(unused, left, right.mT, beta=0, alpha=scale)


def score_slices(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    most_bytes: int,
    multiply: Product = product,
) -> Iterator[ScoreSlice]:
    """Scores of tile means, some rows at a time.

    Args:
        q_means: (B, heads, n_q, head_dim).
        k_means: (B, kv_heads, n_k, head_dim).
        scale: factor of the scores.
        most_bytes: of a slice, unless a single row takes more.
        multiply: what makes the products.

    Yields:
        Slice after slice; whoever lets go of its scores before the next holds one at a time.
    """
    batch, heads, tiles, _ = q_means.shape
    columns, group = k_means.shape[2], heads // k_means.shape[1]
    queries = q_means.reshape(batch * heads // group, group * tiles, -1)
    keys = k_means.flatten(0, 1)
    row_bytes = columns * q_means.element_size()
    for some, rows in row_slices(len(queries), group * tiles, row_bytes, most_bytes):
        yield ScoreSlice(
            some.start * group * tiles + rows.start,
            some,
            rows,
            multiply(queries[some, rows], keys[some], scale),
        )


def row_slices(
    matrices: int, rows: int, row_bytes: int, most_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """Which matrices and which of their rows: several matrices where they fit, else some rows."""
    matrices_at_once = max(1, most_bytes // (rows * row_bytes))
    rows_at_once = max(1, min(rows, most_bytes // row_bytes))
    for matrix in range(0, matrices, matrices_at_once):
        for row in range(0, rows, rows_at_once):
            yield (
                slice(matrix, min(matrix + matrices_at_once, matrices)),
                slice(row, min(row + rows_at_once, rows)),
            )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of fp32 tensors without TF32 and the like."""
    library: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before = library.matmul.fp32_precision
    if before not in ("none", "ieee"):
        library.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before not in ("none", "ieee"):
            library.matmul.fp32_precision = before


def attention(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    scale: float,
    mask: TileMask | None = None,
) -> Tensor:
    """Arguments and result as in ``vsa.stages.coarse.coarse_attention``."""
    attend = functional.scaled_dot_product_attention
    if mask is None:
        k_means, v_means = for_query_heads(q_means, k_means, v_means)
        return attend(q_means, k_means, v_means, scale=scale)
    q_means, k_means, v_means = without_unseen(mask, q_means, k_means, v_means)
    k_means, v_means = for_query_heads(q_means, k_means, v_means)
    allowed, choosing = mask.matrix(q_means.shape[2], q_means.device), mask.choosing()
    if choosing is not None:  # a softmax over nothing would be NaN, here and in its gradient
        allowed = allowed | ~choosing[..., None]
    out = attend(q_means, k_means, v_means, attn_mask=allowed[None], scale=scale)
    return out if choosing is None else out.masked_fill(~choosing[..., None], 0)


def without_unseen(mask: TileMask, q_means: Tensor, *of_keys: Tensor) -> list[Tensor]:
    """Means with zeros where tiles have no part: zero times NaN would be NaN."""
    choosing, seen = mask.choosing(), mask.seen(of_keys[0].shape[1], q_means.device)
    if choosing is not None:
        q_means = q_means.masked_fill(~choosing[..., None], 0)
    return [q_means, *(mean.masked_fill(~seen[..., None], 0) for mean in of_keys)]


def for_query_heads(q_means: Tensor, *of_keys: Tensor) -> Sequence[Tensor]:
    """Means of keys, once for each query head that shares them: (B, heads, n_k, head_dim) each."""
    group = q_means.shape[1] // of_keys[0].shape[1]
    return of_keys if group == 1 else [x.repeat_interleave(group, dim=1) for x in of_keys]


def select(scores: TileScores, v_means: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in ``vsa.backends.base.Backend.select``."""
    q_means, k_means, mask = scores.q_means, scores.k_means, scores.mask
    if mask is not None and v_means is None:
        q_means, k_means = without_unseen(mask, q_means, k_means)
    elif mask is not None and v_means is not None:
        q_means, k_means, v_means = without_unseen(mask, q_means, k_means, v_means)
    rows = RowChoice(
        q_means.shape[:3],
        k_means.shape[2],
        scores.must,
        scores.topk,
        scores.mass,
        q_means.device,
        mask,
        scores.shares,
    )
    most_bytes = SORT_BYTES if scores.mass else SCORE_BYTES
    coarse = CoarseOutput(q_means, v_means)
    for part in score_slices(q_means, k_means, scores.scale, most_bytes):
        allowed = rows.choose(part)
        if v_means is not None:
            coarse.add(part, weights_of(part.scores, allowed))
        del part
    return rows.bitmap, coarse.rows


class RowChoice:
    """The choice of tiles, filled in slice by slice of scores.

    Attributes:
        bitmap: (B, heads, n_q, words) int32.
    """

    def __init__(
        self,
        shape: Sequence[int],
        columns: int,
        must: Tensor | None,
        counts: Sequence[int],
        mass: float,
        device: torch.device,
        mask: TileMask | None = None,
        shares: Sequence[float] = (),
    ) -> None:
        """For rows (B, heads, n_q) of so many columns; the rest as in ``TileScores``."""
        words = bitmap.num_words(columns)
        self.bitmap = torch.empty(*shape, words, dtype=torch.int32, device=device)
        self._words = self.bitmap.view(-1, words)
        self._must, self._counts, self._mass, self._tiles = must, counts, mass, shape[2]
        self._mask, self._heads = mask, shape[1]
        self._count_of_head = _small_tensor(counts, device)
        if mask is not None:
            self._share_of_head = _small_tensor(shares, device)

    def choose(self, part: ScoreSlice) -> Tensor | None:
        """The rows of a slice.

        Returns:
            Which tiles each may choose, (rows, columns) bool, or None for all.
        """
        scores = part.scores.flatten(0, 1)
        row = torch.arange(part.first, part.first + len(scores), device=scores.device)
        tile, head = row % self._tiles, row // self._tiles
        forced = None if self._must is None else self._must[tile]
        budget = head % len(self._counts)
        least = self._count_of_head[budget][:, None]
        allowed = None
        if self._mask is not None:
            allowed = self._mask.rows(head % self._heads, tile)
            least = spend(allowed.sum(-1, keepdim=True), least, self._share_of_head[budget, None])
            forced = None if forced is None else forced & allowed
        kept = kept_tiles(scores, forced, least, max(self._counts), self._mass, allowed)
        self._words[part.first : part.first + len(scores)] = bitmap.pack(kept)
        return allowed


def weights_of(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """The softmax of rows over the tiles that each may choose; zeros where it may choose none.

    Args:
        scores: (matrices, rows, columns).
        allowed: (matrices * rows, columns) bool, or None for all.
    """
    if allowed is None:
        return scores.softmax(-1)
    allowed = allowed.view_as(scores)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0)


class CoarseOutput:
    """The coarse attention's output, filled slice by slice.

    Attributes:
        rows: (B, heads, n_q, head_dim), or None without values.
    """

    def __init__(self, q_means: Tensor, v_means: Tensor | None) -> None:
        """For queries (B, heads, n_q, head_dim) and values (B, kv_heads, n_k, head_dim)."""
        self.rows: Tensor | None = None
        if v_means is not None:
            self.rows = q_means.new_empty(*q_means.shape[:3], v_means.shape[-1])
            self._values = v_means.flatten(0, 1)
            self._matrices = self.rows.view(len(self._values), -1, v_means.shape[-1])

    def add(self, part: ScoreSlice, weights: Tensor) -> None:
        """The rows of a slice: the softmax of its scores, times the values."""
        to = self._matrices[part.matrices, part.rows]
        with full_precision(to.device):
            torch.bmm(weights, self._values[part.matrices], out=to)


def _small_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """(len(values),) int64 or fp64, on the device: a copy from the host would be waited for."""
    dtype = torch.float64 if isinstance(values[0], float) else torch.int64
    tensor = torch.full((len(values),), values[0], dtype=dtype, device=device)
    for place, value in enumerate(values):
        if value != values[0]:
            tensor[place].fill_(value)
    return tensor
