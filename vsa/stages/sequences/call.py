# SPDX-License-Identifier: Apache-2.0
"""Calls over sequences, checked: those that are a grid's, and what all others are lowered to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa.stages import inputs
from vsa.stages.inputs import DEFAULT_TILE, Inputs, Layout, Tile
from vsa.values import checks
from vsa.values.budget import TopK
from vsa.values.grid import SLOTS, Grid
from vsa.values.remembered import Remembered
from vsa.values.selection import Selection, check_fits
from vsa.values.sequence import Sequence


class Given(NamedTuple):
    """Arguments of a public function as the user gave them, None for those that it has not."""

    q: Tensor
    k: Tensor
    v: Tensor
    topk: TopK | None
    grid: Layout | None
    kv_grid: Layout | None
    tile: Tile
    scale: float | None
    selection: Selection | None
    text_valid: Tensor | None
    backend: str
    mask: object = None


class GridCall(NamedTuple):
    """The arguments of a call over grids that is the same as one over sequences."""

    grid: Grid
    kv_grid: Grid
    topk: TopK | None
    selection: Any  # a Selection where one was given, else None
    text_valid: Tensor | None


@dataclass(frozen=True, eq=False)
class Mixed:
    """A checked call over sequences.

    Attributes:
        call: q, k and v and all that does not depend on segments. Its grids are those of the one
            segment that chooses and of the one that is chosen from, where everything else is text
            to them; else they stand in for what there is none of.
        in_raster: whether they are those: the fine stage then runs over them, where tokens lie.
            Elsewhere tokens are copied into padded tiles.
        sequence: the queries'.
        kv_sequence: the keys'.
        text_valid: (B, tokens of flat segments) bool, which of them are real, or None for all.
    """

    call: Inputs
    in_raster: bool
    sequence: Sequence
    kv_sequence: Sequence
    text_valid: Tensor | None


def are_meant(grid: object, kv_grid: object, selection: object) -> bool:
    """Whether any of these speaks of a sequence."""
    return (
        isinstance(grid, Sequence)
        or isinstance(kv_grid, Sequence)
        or getattr(selection, "sequences", None) is not None
    )


def as_grids(given: Given) -> GridCall | None:
    """The same call over grids, where there is one: a video, and text that chooses nothing."""
    sequence, kv_sequence = _sequences(given)
    selection = given.selection
    same = grids_of(sequence, kv_sequence, given.topk, chooses=selection is None)
    if same is None:
        return None
    if selection is not None:
        _check_grids_of(selection, sequence, kv_sequence)
        selection = replace(selection, grid=same.grid, kv_grid=same.kv_grid, sequences=None)
    valid = _of_all_text(sequence, given.text_valid)
    return same._replace(selection=selection, text_valid=valid)


def grids_of(
    grid: Layout, kv_grid: Layout | None, topk: TopK | None, chooses: bool = True
) -> GridCall | None:
    """``as_grids`` of what has no tensors; ``chooses`` says that ``topk`` counts."""
    sequence = sequence_of(grid)
    own, own_of_keys = (
        _grid_of(sequence),
        _grid_of(sequence if kv_grid is None else sequence_of(kv_grid)),
    )
    if own.grid is None or own_of_keys.grid is None or not own.is_all or not own_of_keys.is_all:
        return None
    if own_of_keys.topk is not None and chooses:
        check_no_topk(topk)
        topk = own_of_keys.topk
    return GridCall(own.grid, own_of_keys.grid, topk, None, None)


def sequence_of(grid: Layout) -> Sequence:
    """Any grid as a sequence."""
    return Sequence.of(grid if isinstance(grid, (Grid, Sequence)) else Grid(grid))


def resolve(
    given: Given, gates: Mapping[str, Tensor | None] | None = None, precision: object = "native"
) -> Mixed:
    """Check what the parts of ``vsa`` have in common, for sequences.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
        RuntimeError: an explicit backend that cannot run here, with what is missing.
    """
    q, k, v, selection, text_valid = given.q, given.k, given.v, given.selection, given.text_valid
    sequence, kv_sequence = _sequences(given)
    for name, x, of in (("q", q, sequence), ("k", k, kv_sequence)):
        if checks.tensor(name, x).ndim == 6:
            raise ValueError(
                f"{name} must be flat, (B, S, heads, head_dim), for a vsa.Sequence, but its shape "
                f"is {tuple(x.shape)}"
            )
        if x.ndim == 4:
            of.check_length(name, x.shape[1], "its grid")
    grids = _grid_of(sequence).grid, _grid_of(kv_sequence).grid
    in_raster = grids[0] is not None and grids[1] is not None
    if in_raster:
        text = _of_all_text(sequence, text_valid)
    else:
        text = None
        grids = (
            Grid((1, 1, sequence.length), (1, 1, SLOTS)),
            Grid((1, 1, kv_sequence.length), (1, 1, SLOTS)),
        )
        if precision != "native":
            raise ValueError(
                f"precision must be 'native' for this grid, but it is {precision!r}: a "
                "vsa.Sequence has eight bits where one video alone competes and is sparse"
            )
    _check_text_valid(text_valid, q, sequence, kv_sequence)
    call = inputs.resolve(
        q,
        k,
        v,
        grid=grids[0],
        kv_grid=grids[1],
        scale=given.scale,
        text_valid=text,
        gates=gates,
        backend=given.backend,
        precision=precision,
    )
    if selection is not None:
        check_fits(selection, call.q, sequence, kv_sequence)
    return Mixed(call, in_raster, sequence, kv_sequence, text_valid)


def check_no_topk(topk: object) -> None:
    """Where every segment that competes has a budget of its own."""
    if topk is not None:
        raise ValueError(
            "topk must be None where all segments that compete have a topk of their own, but it "
            f"is {topk!r}"
        )


def _sequences(given: Given) -> tuple[Sequence, Sequence]:
    """Of the queries and of the keys; the arguments come before what the selection knows."""
    grid, kv_grid = given.grid, given.kv_grid
    known = getattr(given.selection, "sequences", None)
    if known is not None:
        grid = known[0] if grid is None else grid
        kv_grid = known[1] if kv_grid is None else kv_grid
    if grid is None:
        raise ValueError(
            "grid must be given where kv_grid is a vsa.Sequence, but it is None: the grid of q, or "
            "a sequence of its own"
        )
    if given.tile not in (DEFAULT_TILE, "auto"):
        raise ValueError(
            f"tile must be left out where a grid is a vsa.Sequence, but it is {given.tile!r}: each "
            "segment has a tile of its own"
        )
    found = []
    for name, each in (("grid", grid), ("kv_grid", grid if kv_grid is None else kv_grid)):
        if not isinstance(each, (Grid, Sequence)):
            each = Grid(checks.extent(name, each))
        found.append(Sequence.of(each))
    sequence, kv_sequence = found
    if not sequence.query_tiles:
        raise ValueError(
            "grid must have a segment whose queries are sparse, but all of them are dense: no tile "
            "would be chosen"
        )
    if not kv_sequence.key_tiles:
        raise ValueError(
            "grid must have a segment whose keys compete, but all of them are kept: no tile could "
            "be chosen"
        )
    return sequence, kv_sequence


class OwnGrid(NamedTuple):
    """What of a sequence is a grid.

    Attributes:
        grid: of its one video that chooses and is chosen from, where all else is always attended
            and attends everything, or None.
        is_all: whether nothing else is in the coarse stage either.
        topk: the video's own.
    """

    grid: Grid | None
    is_all: bool = False
    topk: TopK | None = None


_grids: Remembered[OwnGrid] = Remembered(64)


def _grid_of(sequence: Sequence) -> OwnGrid:
    """Found once for equal sequences."""
    if torch.compiler.is_compiling():
        return _own_grid(sequence)
    found = _grids.get(sequence)
    if found is None:
        found = _own_grid(sequence)
        _grids.put(sequence, found)
    return found


def _own_grid(sequence: Sequence) -> OwnGrid:
    places = [place for place, each in enumerate(sequence.segments) if not each.is_text]
    video = sequence.segments[places[0]]
    whole = video.is_video and video.competes and video.is_sparse and type(video.boxes) is Grid
    if len(places) > 1 or not whole:
        return OwnGrid(None)
    at = sequence.tokens_of(places[0])
    grid = replace(video.boxes, prefix=at.start, suffix=sequence.length - at.stop)
    return OwnGrid(grid, not any(x.coarse and x.is_text for x in sequence.segments), video.topk)


def _of_all_text(sequence: Sequence, text_valid: Tensor | None) -> Tensor | None:
    """``text_valid`` of a grid: kept and dense videos are text too, all of it real."""
    others = [each for each in sequence.segments if each.is_text]
    if text_valid is None or not any(each.is_video for each in others):
        return text_valid
    if not isinstance(text_valid, Tensor) or text_valid.ndim != 2:
        return text_valid  # which is refused elsewhere
    found, first = [], 0
    for each in others:
        if each.is_video:
            found.append(text_valid.new_ones(len(text_valid), each.tokens))
        else:
            found.append(text_valid[:, first : first + each.tokens])
            first += each.tokens
    return torch.cat([*found, text_valid[:, first:]], dim=1)  # too many are refused elsewhere


def _check_text_valid(value: object, q: Tensor, sequence: Sequence, keys: Sequence) -> None:
    """None, or (B, tokens of flat segments) bool, which queries and keys have alike."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"text_valid must be a bool tensor, but it is {kind}")
    wanted = (q.shape[0], sequence.text)
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"text_valid must be (B, tokens of all flat segments) = {wanted}, but its shape is "
            f"{tuple(value.shape)}"
        )
    flat, of_keys = (
        [each.tokens for each in of.segments if not each.is_video] for of in (sequence, keys)
    )
    if flat != of_keys:
        raise ValueError(
            "text_valid needs kv_grid to have the flat segments of grid, but those of the keys "
            f"have {of_keys} tokens and those of the queries {flat}"
        )
    if value.device != q.device:
        raise ValueError(
            f"text_valid must share the device of q, but it is on {value.device} and q is on "
            f"{q.device}"
        )


def _check_grids_of(selection: Selection, sequence: Sequence, kv_sequence: Sequence) -> None:
    """A selection that was made for sequences was made for these."""
    if selection.sequences not in (None, (sequence, kv_sequence)):
        raise ValueError(
            f"selection was made for the sequences {selection.sequences}, but it is used with "
            f"{(sequence, kv_sequence)}"
        )
