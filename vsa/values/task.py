# SPDX-License-Identifier: Apache-2.0
"""What can be prepared before its numbers are known: see ``vsa.backends.base.Prepared``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vsa.values.grid import Grid
from vsa.values.ring import Ring
from vsa.values.tile_mask import TileMask, mask_of


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

    @property
    def mask(self) -> TileMask | None:
        """Which tiles a row may choose, or a choice that is given was made under."""
        return mask_of(self.rule, None)
