# SPDX-License-Identifier: Apache-2.0
"""What masks over tiles mean, frame by frame in plain loops: part of the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vsa.values.masks import ChunkCausal, Rule, TeacherForcing
from vsa.verify import reference

Extent = Sequence[int]


def allowed(mask: Rule, grid: Extent, tile: Extent, kv_grid: Extent | None = None) -> Tensor:
    """Which key tiles each query tile may choose, (n_q, n_k) bool.

    Args:
        mask: a rule.
        grid: (T, H, W) of the queries.
        tile: tokens per tile along (t, h, w).
        kv_grid: (T, H, W) of the keys where it differs; the queries are the last frames.
    """
    kv_grid = kv_grid or grid
    past = kv_grid[0] - grid[0]
    if isinstance(mask, ChunkCausal):
        frames, window, sinks = mask.frames, mask.window, mask.sinks
        return _by_frames(
            lambda t, s: chunk_causal(past + t, s, frames, window, sinks), grid, tile, kv_grid
        )
    if isinstance(mask, TeacherForcing):
        half = grid[0] // 2
        return _by_frames(
            lambda t, s: teacher_forcing(t, s, half, mask.frames), grid, tile, kv_grid
        )
    places, key_places = (_places(each, tile) for each in (grid, kv_grid))
    rows = [
        [
            all(
                abs(a - b) <= reach
                for a, b, reach in zip((t + past // tile[0], h, w), other, mask.reach, strict=True)
            )
            for other in key_places
        ]
        for t, h, w in places
    ]
    return torch.tensor(rows)


def chunk_causal(t: int, s: int, frames: int, window: int | None, sinks: int) -> bool:
    """Whether frame t may see frame s."""
    own, other = t // frames, s // frames
    recent = window is None or own - other < window
    return other <= own and (recent or other < sinks)


def teacher_forcing(t: int, s: int, half: int, frames: int) -> bool:
    """Whether frame t may see frame s: two videos of ``half`` frames each, the clean one first."""
    own, other = t % half // frames, s % half // frames
    if t < half:
        return s < half and other <= own
    return other < own if s < half else other == own


def _by_frames(
    sees: Callable[[int, int], bool], grid: Extent, tile: Extent, kv_grid: Extent
) -> Tensor:
    """From a rule on frames, which is the same for all tokens of two tiles."""
    frames_of, key_frames_of = (
        [
            {token // (shape[1] * shape[2]) for token in tokens}
            for tokens in reference.tiles_of(shape, tile, 0)
        ]
        for shape in (grid, kv_grid)
    )
    rows = []
    for mine in frames_of:
        row = []
        for others in key_frames_of:
            found = {sees(t, s) for t in mine for s in others}
            assert len(found) == 1, "a tile straddles chunks"
            row.append(found.pop())
        rows.append(row)
    return torch.tensor(rows)


def _places(grid: Extent, tile: Extent) -> list[tuple[int, int, int]]:
    """(t, h, w) of each tile, counted in tiles."""
    nt, nh, nw = (-(-extent // size) for extent, size in zip(grid, tile, strict=True))
    return [(t, h, w) for t in range(nt) for h in range(nh) for w in range(nw)]
