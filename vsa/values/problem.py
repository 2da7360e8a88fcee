# SPDX-License-Identifier: Apache-2.0
"""The arguments of the operators, each group of them written down once.

A group is what belongs together in a call. ``vsa.operators.schema`` makes the signatures of
``torch.ops.vsa.*`` from them, and a backend gets them as they are: a new argument is one line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vsa.values import padded
from vsa.values.grid import Grid
from vsa.values.tile_mask import TileMask, mask_of


class Problem(NamedTuple):
    """What the fine stage computes, in both directions.

    Attributes:
        q: (B, S_q, heads, head_dim), any strides but a contiguous last dimension.
        k: (B, S_k, kv_heads, head_dim), the same.
        v: like k.
        bitmap: (B, heads, n_q, words) int32, the key tiles of every query tile.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        grid: the queries' grid, eight ints, see ``Grid.as_ints``.
        kv_grid: the keys' grid, eight ints.
        scale: factor of the scores.
        backend: name of the backend that computes it, never "auto".
        rule: what the bitmap was chosen under, for a tail and the coarse branch, see ``TileMask``.
        allowed: see rule.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bitmap: Tensor
    text_valid: Tensor | None
    grid: Sequence[int]
    kv_grid: Sequence[int]
    scale: float
    backend: str
    rule: Sequence[int] = ()
    allowed: Tensor | None = None

    @property
    def mask(self) -> TileMask | None:
        """What the bitmap was chosen under."""
        return mask_of(self.rule, self.allowed)

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of the queries and of the keys."""
        return Grid.from_ints(self.grid), Grid.from_ints(self.kv_grid)

    @property
    def tile_sizes(self) -> tuple[None, None]:
        """Those of the queries and of the keys follow from the grids."""
        return None, None


class PaddedProblem(NamedTuple):
    """What the fine stage computes over padded tiles: 64 slots each, the first of which are real.

    Attributes:
        q: (B, 64 * n_q, heads, head_dim), any strides but a contiguous last dimension.
        k: (B, 64 * n_k, kv_heads, head_dim), the same.
        v: like k.
        bitmap: (B, heads, n_q, words) int32, the key tiles of every query tile, none among them
            that has no real token.
        sizes: (n_q,) int32, real tokens of each query tile, 0 to 64.
        kv_sizes: (n_k,) int32, the same of the keys.
        scale: factor of the scores.
        backend: name of the backend that computes it, never "auto".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bitmap: Tensor
    sizes: Tensor
    kv_sizes: Tensor
    scale: float
    backend: str

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of the queries and of the keys: a tile after the other, whole ones."""
        return padded.grid_of(len(self.sizes)), padded.grid_of(len(self.kv_sizes))

    @property
    def tile_sizes(self) -> tuple[Tensor, Tensor]:
        """Of the queries and of the keys."""
        return self.sizes, self.kv_sizes

    @property
    def text_valid(self) -> None:
        """There is no text."""
        return None

    @property
    def mask(self) -> None:
        """There is no mask."""
        return None


FineProblem = Problem | PaddedProblem
"""A problem of the fine stage, over either kind of tiles."""


class RowBound(NamedTuple):
    """What a backend that makes lists of tiles knows without reading the bitmap.

    Attributes:
        most: upper bound of the key tiles in a row of the bitmap.
    """

    most: int


class TailMeans(NamedTuple):
    """Tile means of the keys, one more key each of every query tile that does not choose the tile.

    Their gradient is part of the gradients of k and v.

    Attributes:
        tail_keys: (B, kv_heads, n_k, head_dim) fp32 (fp64 for fp64 inputs), contiguous.
        tail_values: like tail_keys.
    """

    tail_keys: Tensor
    tail_values: Tensor


class EightBits(NamedTuple):
    """How the fine stage computes in eight bits.

    Attributes:
        precision: "int8" or "fp8".
    """

    precision: str


class Means(NamedTuple):
    """Tile means, exactly where there is a coarse gate.

    Their gradient is part of the gradients of q, k and v.

    Attributes:
        q_means: (B, heads, n_q, head_dim) fp32, or None.
        k_means: (B, kv_heads, n_k, head_dim) fp32, or None.
        v_means: like k_means, or None.
    """

    q_means: Tensor | None
    k_means: Tensor | None
    v_means: Tensor | None


class Gates(NamedTuple):
    """The gates of a call, expanded to the shape of q, and what the coarse gate multiplies.

    Attributes:
        gate_fine: (B, S_q, heads, head_dim), the type of q or fp32, any strides; None for 1.
        gate_coarse: the same; None leaves the coarse branch out.
        coarse: (B, heads, n_q, head_dim) fp32, contiguous: the coarse attention's output, exactly
            where there is a ``gate_coarse``. It gets no gradient of its own.
    """

    gate_fine: Tensor | None = None
    gate_coarse: Tensor | None = None
    coarse: Tensor | None = None


class Upstream(NamedTuple):
    """Gradients that a backward starts from.

    Attributes:
        grad_out: of out, (B, S_q, heads, head_dim).
        grad_lse: of lse, (B, heads, S_q), or None for zero.
    """

    grad_out: Tensor
    grad_lse: Tensor | None


class Saved(NamedTuple):
    """What a forward leaves to its backward.

    Attributes:
        out: the fine stage's output before gates, (B, S_q, heads, head_dim).
        lse: its log-sum-exp, (B, heads, S_q) fp32 (fp64 for fp64 inputs), natural logarithm.
    """

    out: Tensor
    lse: Tensor


class TileScores(NamedTuple):
    """What the choice of tiles is made from.

    Attributes:
        q_means: (B, heads, n_q, head_dim) fp32 or fp64.
        k_means: (B, kv_heads, n_k, head_dim), the same type.
        must: (n_q, n_k) bool, tiles that are always kept, or None.
        topk: from 1 to n_k; one number for all query heads, or one each.
        mass: least share of a row's softmax that its tiles hold, in [0, 1].
        numbers: stands for both ``topk`` and ``mass`` where they vary in compiled code, see
            ``vsa.values.budget.Budget``; (1 + one or heads,) fp64 on the CPU. None elsewhere.
        scale: factor of the scores.
        backend: name of the backend that computes it, never "auto".
        rule: which tiles a row may choose, see ``vsa.values.tile_mask.TileMask``; empty without.
        allowed: the same as a tensor (heads or 1, n_q, n_k) bool, or None.
        shares: like ``topk``, budgets that are a share of what a row may choose, 0 for others.
    """

    q_means: Tensor
    k_means: Tensor
    must: Tensor | None
    topk: Sequence[int]
    mass: float
    numbers: Tensor | None
    scale: float
    backend: str
    rule: Sequence[int] = ()
    allowed: Tensor | None = None
    shares: Sequence[float] = ()

    @property
    def mask(self) -> TileMask | None:
        """Which tiles a row may choose."""
        return mask_of(self.rule, self.allowed)


class SubBlockScores(NamedTuple):
    """What the choice of tiles is made from where their runs are scored: see ``vsa.SubBlocks``.

    Attributes:
        q: (B, S_q, heads, head_dim), any strides but a contiguous last dimension.
        k: (B, S_k, kv_heads, head_dim), the same type.
        must: see ``TileScores``, and so are ``topk``, ``mass`` and ``numbers``.
        topk: see must.
        mass: see must.
        numbers: see must.
        grid: the queries' grid, eight ints, see ``Grid.as_ints``.
        kv_grid: the keys' grid, eight ints.
        runs: of a tile.
        scale: factor of the products.
        backend: name of the backend that computes it, never "auto".
        rule: see ``TileScores``, and so are ``allowed`` and ``shares``.
        allowed: see rule.
        shares: see rule.
    """

    q: Tensor
    k: Tensor
    must: Tensor | None
    topk: Sequence[int]
    mass: float
    numbers: Tensor | None
    grid: Sequence[int]
    kv_grid: Sequence[int]
    runs: int
    scale: float
    backend: str
    rule: Sequence[int] = ()
    allowed: Tensor | None = None
    shares: Sequence[float] = ()

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of the queries and of the keys."""
        return Grid.from_ints(self.grid), Grid.from_ints(self.kv_grid)

    @property
    def mask(self) -> TileMask | None:
        """Which tiles a row may choose."""
        return mask_of(self.rule, self.allowed)


class CoarseValues(NamedTuple):
    """Values of the coarse attention.

    Attributes:
        v_means: (B, kv_heads, n_k, head_dim), the type of the other means.
    """

    v_means: Tensor


class WholeCall(NamedTuple):
    """A whole call of attention that chooses its tiles, as one operator.

    Attributes:
        q: (B, S_q, heads, head_dim), any strides but a contiguous last dimension.
        k: (B, S_k, kv_heads, head_dim), the same.
        v: like k.
        gate_fine: (B, S_q, heads, head_dim), the type of q or fp32, any strides; None for 1.
        gate_coarse: the same; None leaves the coarse branch out.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        topk: see ``TileScores``, and so are ``mass`` and ``numbers``.
        mass: see topk.
        numbers: see topk.
        grid: the queries' grid, eight ints, see ``Grid.as_ints``.
        kv_grid: the keys' grid, eight ints.
        runs: of a tile, whose means are scored for the choice; 1 for its mean.
        scale: factor of the scores.
        backend: name of the backend that computes it, never "auto".
        rule: see ``TileScores``, and so are ``allowed`` and ``shares``.
        allowed: see rule.
        shares: see rule.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate_fine: Tensor | None
    gate_coarse: Tensor | None
    text_valid: Tensor | None
    topk: Sequence[int]
    mass: float
    numbers: Tensor | None
    grid: Sequence[int]
    kv_grid: Sequence[int]
    runs: int
    scale: float
    backend: str
    rule: Sequence[int] = ()
    allowed: Tensor | None = None
    shares: Sequence[float] = ()

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of the queries and of the keys."""
        return Grid.from_ints(self.grid), Grid.from_ints(self.kv_grid)

    @property
    def mask(self) -> TileMask | None:
        """Which tiles a row may choose."""
        return mask_of(self.rule, self.allowed)


class WholeSaved(NamedTuple):
    """What the forward of a whole call leaves to its backward.

    Attributes:
        fine: the fine stage's output before gates, (B, S_q, heads, head_dim).
        lse: its log-sum-exp, (B, heads, S_q) fp32, natural logarithm.
        bitmap: (B, heads, n_q, words) int32, the choice.
        coarse: (B, heads, n_q, head_dim) fp32; empty without a coarse gate.
        means: numbers of the tile means of q, k and v, one after the other, fp32; empty without a
            coarse gate.
    """

    fine: Tensor
    lse: Tensor
    bitmap: Tensor
    coarse: Tensor
    means: Tensor
