# SPDX-License-Identifier: Apache-2.0
"""What every head of a layer keeps with one tile, with two, with all: recall at every budget.

The dense attention of a query tile is added up by key tile, exactly, and the key tiles are put in
the order in which they would be chosen. The running sum is recall at every number of tiles at once.
It is measured for a few query tiles, spread over the video, and averaged over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from vsa.backends import torch_coarse, torch_sub_blocks
from vsa.backends.tiles import accumulation_dtype
from vsa.diagnostics.metrics import whole_tiles
from vsa.values import checks
from vsa.values.grid import Grid
from vsa.values.score import Score, runs_of

SAMPLED_TILES = 16
"""Query tiles that are measured, unless asked otherwise."""
SLICE_BYTES = 256 << 20
"""Scores between tokens that exist at a time."""
Order = Score | Literal["oracle"]
"""What tiles can be ordered by: a score, or their own share of dense attention ("oracle"), which no
score can know and none can be above."""


class Curves:
    """Recall at every budget by layer, step and head; the mean over what was noted.

    Nothing here waits for the device before the numbers are read.

    Args:
        layers: their names.
        tiles: query tiles that are measured, spread evenly over those that are whole.
        score: what the key tiles are ordered by, as in ``vsa.attention``; or "oracle", by what
            they hold, which is the most that any score can reach.

    Attributes:
        grid: the video's tokens and tiles, known from the first note on.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, layers: Sequence[str], *, tiles: int = SAMPLED_TILES, score: Order = "mean"
    ) -> None:
        checks.not_empty("layers", layers := list(layers))
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers must have names of their own, but they are {layers!r:.80}")
        self.layers = layers
        self.tiles = checks.integer("tiles", tiles, at_least=1)
        check_score(score)
        self.score = score
        self.grid: Grid | None = None
        self._sums: dict[tuple[str, int], tuple[Tensor, int]] = {}

    @torch.no_grad()
    def note(self, layer: str, q: Tensor, k: Tensor, *, grid: Grid, step: int = 0) -> None:
        """Measure one call of a layer; several of one step are averaged.

        Args:
            layer: its name.
            q: (B, S, heads, head_dim), after the rotary embedding, text included where the grid
                has some.
            k: (B, S, kv_heads, head_dim); kv_heads divides heads.
            grid: of both.
            step: number of the denoising step.

        Raises:
            ValueError: another layer, or another grid or number of heads than before.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers!r:.80}, but it is {layer!r}")
        video = replace(grid, prefix=0, suffix=0)
        if self.grid not in (None, video):
            raise ValueError(
                f"grid is {grid.shape} in tiles of {grid.tile}, but these curves are of "
                f"{self.grid.shape} in tiles of {self.grid.tile}: calibrate for each video size"
            )
        for name, x in (("q", q), ("k", k)):
            checks.tensor(name, x)
            grid.check_length(name, x.shape[1])
        checks.keys_match(q, k, k)
        with torch.autocast(q.device.type, enabled=False):  # which would round the products
            new = recall_by_count(q, k, grid, tiles=self.tiles, score=self.score).mean(0)
        before, count = self._sums.get((layer, step), (None, 0))
        if before is not None and before.shape != new.shape:
            raise ValueError(
                f"q must have {len(before)} heads as before, but it has {len(new)} in {layer!r}"
            )
        self.grid = video
        self._sums[layer, step] = (new if before is None else before + new, count + 1)

    @property
    def steps(self) -> list[int]:
        """The steps of which something was noted."""
        return sorted({step for _, step in self._sums})

    def noted(self) -> list[str]:
        """The layers of which something was noted, in their order."""
        found = {layer for layer, _ in self._sums}
        return [layer for layer in self.layers if layer in found]

    def of(self, layer: str, steps: Sequence[int] | None = None) -> Tensor:
        """Recall with 1 to n tiles, (heads, n) fp64 on the CPU; the mean over steps.

        Raises:
            ValueError: nothing noted of this layer in these steps.
        """
        wanted = self.steps if steps is None else steps
        found = [self._sums[layer, step] for step in wanted if (layer, step) in self._sums]
        if not found:
            raise ValueError(f"nothing was noted of layer {layer!r} in the steps {list(wanted)}")
        means = torch.stack([total.double().cpu() / count for total, count in found]).mean(0)
        return means / means[:, -1:]  # all tiles keep everything, whatever was rounded


def check_score(score: object) -> None:
    """A score that tiles can be ordered by.

    Raises:
        ValueError, TypeError: another one.
    """
    if score != "oracle":
        runs_of(score)


def recall_by_count(
    q: Tensor, k: Tensor, grid: Grid, *, tiles: int | None = None, score: Order = "mean"
) -> Tensor:
    """Share of dense attention to the video with 1 to n tiles, chosen by a score.

    Args:
        q: (B, S, heads, head_dim), text included where the grid has some.
        k: (B, S, kv_heads, head_dim).
        grid: of both.
        tiles: query tiles that are measured; None for all, clipped ones included.
        score: what the key tiles are ordered by.

    Returns:
        (B, heads, n), the mean over query tiles; fp32 (fp64 for fp64 inputs).
    """
    chosen = None if tiles is None else whole_tiles(grid, tiles, q.device)[0]
    mass = tile_mass(q, k, grid, chosen)
    by_mass = isinstance(score, str) and score == "oracle"
    key = mass if by_mass else tile_scores(q, k, grid, chosen, cast("Score", score))
    order = key.argsort(dim=-1, descending=True, stable=True)
    return mass.gather(-1, order).cumsum(-1).mean(2)


def tile_scores(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None, score: Score = "mean"
) -> Tensor:
    """What ``vsa.select`` compares, (B, heads, query tiles, n); NaN is minus infinity."""
    if runs_of(score) > 1:
        found = torch_sub_blocks.scores_of_rows(q, k, grid, runs_of(score), chosen)
        return torch.where(found.isnan(), float("-inf"), found) + 0.0
    q_means, k_means = (torch_coarse.tile_means(x, grid) for x in (q, k))
    if chosen is not None:
        q_means = q_means[:, :, chosen]
    scale = q.shape[-1] ** -0.5
    batch, heads, rows, _ = q_means.shape
    (each,) = torch_coarse.for_query_heads(q_means, k_means)
    found = torch_coarse.product(q_means.flatten(0, 1), each.flatten(0, 1), scale)
    found = torch.where(found.isnan(), float("-inf"), found) + 0.0  # -0 ties with 0
    return found.view(batch, heads, rows, -1)


def tile_mass(q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None) -> Tensor:
    """Dense attention of query tiles to the video, added up by key tile.

    Args:
        q: (B, S, heads, head_dim).
        k: (B, S, kv_heads, head_dim).
        grid: of both.
        chosen: numbers of the query tiles, None for all.

    Returns:
        (B, heads, query tiles, n); rows add up to 1. The mean over the tokens of a query tile.
    """
    parts = [part.mass for part in weight_slices(q, k, grid, chosen)]
    return torch.cat(parts).view(q.shape[0], q.shape[2], -1, grid.num_tiles)


class WeightSlice(NamedTuple):
    """Dense attention of some query tiles of one head.

    Attributes:
        batch: number of the batch element.
        head: number of the query head.
        rows: which of the query tiles that were asked for.
        weights: (tiles * slots, n * slots), softmax over the keys; zero where a key slot is empty.
        mass: (tiles, n), the same by key tile, the mean over the tokens of a query tile.
    """

    batch: int
    head: int
    rows: slice
    weights: Tensor
    mass: Tensor


def weight_slices(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None
) -> Iterator[WeightSlice]:
    """Dense attention of query tiles to the video, a head and some tiles at a time.

    Args:
        q: (B, S, heads, head_dim); weights are fp32, or fp64 for fp64.
        k: (B, S, kv_heads, head_dim).
        grid: of both; slots are those of ``Grid.tokens_of_tiles``.
        chosen: numbers of the query tiles, None for all.
    """
    dtype = accumulation_dtype(q)
    token = grid.tokens_of_tiles(q.device)
    rows = token if chosen is None else token[chosen]
    batch, _, heads, head_dim = q.shape
    group, (n, slots) = heads // k.shape[2], token.shape
    queries = grid.prefix + rows.clamp(min=0)
    keys = grid.prefix + token.clamp(min=0).flatten()
    real, beyond = (rows >= 0).to(dtype)[..., None], (token < 0).flatten()
    step = max(1, SLICE_BYTES // (slots * n * slots * dtype.itemsize))
    for b, head, first in product(range(batch), range(heads), range(0, len(rows), step)):
        part = slice(first, first + step)
        left = q[b, queries[part].flatten(), head].to(dtype)[None]
        right = k[b, keys, head // group].to(dtype)[None]
        scores = torch_coarse.product(left, right, head_dim**-0.5)[0]
        weights = scores.masked_fill_(beyond, float("-inf")).softmax(-1)
        of_tile = weights.view(-1, slots, n, slots).sum(-1)
        mass = (of_tile * real[part]).sum(1) / real[part].sum(1)
        yield WeightSlice(b, head, part, weights, mass)
