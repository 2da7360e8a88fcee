# SPDX-License-Identifier: Apache-2.0
"""Keywords of the public functions, for their types alone, and what comes back."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from vsa.stages.inputs import Tile
from vsa.values.grid import Extent, Grid
from vsa.values.kv_cache import KVCache
from vsa.values.masks import Mask
from vsa.values.precision import Precision
from vsa.values.score import Score
from vsa.values.selection import Selection
from vsa.values.sequence import Sequence


class FineOptions(TypedDict, total=False):
    """Keywords of ``block_sparse_attention`` but for what it returns; meanings as there."""

    grid: Extent | Grid | Sequence | None
    kv_grid: Extent | Grid | Sequence | None
    tile: Tile
    scale: float | None
    text_valid: Tensor | None
    tail: bool
    mask: Mask | None
    precision: Precision
    backend: str


class Options(FineOptions, total=False):
    """Keywords of ``attention`` but for what it returns; meanings as there."""

    gate_coarse: Tensor | None
    gate_fine: Tensor | None
    selection: Selection | None
    score: Score
    cache: KVCache | None


def asked_for(
    out: Tensor,
    selection: Selection | None,
    lse: Tensor | None,
    with_selection: bool,
    with_lse: bool,
) -> Any:
    """What a call returns, by its two flags."""
    extras: list[Any] = [selection] * with_selection + [lse] * with_lse
    return (out, *extras) if extras else out
