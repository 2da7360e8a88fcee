# SPDX-License-Identifier: Apache-2.0
"""What can be prepared before its numbers are known: see ``vsa.backends.base.Prepared``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vsa.values.grid import Grid
from vsa.values.ring import Ring
from vsa.values.tile_mask import TileMask, mask_of

NO_PADDING = (None, None, None, None)
"""In place of the tensors that only padded tiles have: sizes, kv_sizes, lists or a map, counts."""


class PaddedTiles(NamedTuple):
    """Of a call over padded tiles: real tokens of each, and what rows keep where that is given.

    Attributes:
        sizes: (n_q,) int32, contiguous, real tokens of the caller's query tiles; None where all
            slots of the queries are.
        kv_sizes: (n_k,) int32, the same of the keys.
        lists: (B, heads, n_q, width) int32, contiguous: key tiles that rows keep; or None.
        counts: (B, heads, n_q) int32, contiguous, how many of a list are read; None without lists.
        block_map: (B, heads, n_q, n_k) bool, contiguous: key tiles that rows keep; or None.
        parts: tiles of 64 slots in one of the caller's.
    """

    sizes: Tensor | None
    kv_sizes: Tensor
    lists: Tensor | None
    counts: Tensor | None
    block_map: Tensor | None
    parts: int

    @property
    def given(self) -> Tensor | None:
        """What rows keep, None where that is chosen."""
        return self.block_map if self.lists is None else self.lists


class Task(NamedTuple):
    """A whole call of attention, as far as no number in a tensor matters: what can be prepared.

    Attributes:
        q: (B, S_q, heads, head_dim); of all tensors only shape, strides, dtype and device count.
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        gate_fine: (B, S_q, heads, head_dim), the type of q or fp32, or None.
        gate_coarse: the same.
        text_valid: (B, prefix + suffix) bool, or None where all text is valid.
        bitmap: (B, heads, n_q, words) int32, a choice of tiles that is given, or None for one that
            is to be made.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        counts: least tiles of a row, one number or one per query head; none with a ``bitmap``.
        mass: least share of a row's softmax.
        runs: of a tile, whose means are scored for the choice; 1 for its mean.
        scale: factor of the scores.
        gradients: whether gradients are wanted.
        gives_lse: whether the log-sum-exp is a result.
        gives_bitmap: whether the choice is a result.
        misaligned: whether q, k and v lie where the kernels cannot read them.
        tail: whether tiles that are not chosen enter the softmax by their means.
        precision: "native", "int8" or "fp8".
        rule: which tiles a row may choose, see ``vsa.values.tile_mask.TileMask``; empty without.
        shares: like ``counts``, budgets that are a share of what a row may choose, 0 for others.
        padded: of a call over padded tiles, else None; there is no text, mask or tail then.
        ring: of the cache that k and v, the current chunk's, are written to and that is attended;
            None without a cache. The choice is in the order of time.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate_fine: Tensor | None
    gate_coarse: Tensor | None
    text_valid: Tensor | None
    bitmap: Tensor | None
    grid: Grid
    kv_grid: Grid
    counts: Sequence[int]
    mass: float
    runs: int
    scale: float
    gradients: bool
    gives_lse: bool
    gives_bitmap: bool
    misaligned: tuple[bool, bool, bool] = (False, False, False)
    tail: bool = False
    precision: str = "native"
    rule: Sequence[int] = ()
    shares: Sequence[float] = ()
    ring: Ring | None = None
    padded: PaddedTiles | None = None

    @property
    def chooses(self) -> bool:
        """Whether the choice is made, and not given in one way or another."""
        return self.bitmap is None and (self.padded is None or self.padded.given is None)

    @property
    def mask(self) -> TileMask | None:
        """Which tiles a row may choose, or a choice that is given was made under."""
        return mask_of(self.rule, None)
