# SPDX-License-Identifier: Apache-2.0
"""A sequence of several segments, each with tiles of its own: text, conditions, audio, videos.

The general form of a ``Grid`` with text: what VSA-H3 packs into one attention (FastVideo 0.2.1,
SGLang 0.5.23, backend ``video_sparse_attn_h3``), in raster order and without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from vsa.values import budget as budgets
from vsa.values import checks
from vsa.values.budget import TopK
from vsa.values.grid import SLOTS, Extent, Grid

MOST_TOKENS = 256
"""Of a tile of a segment: four of the kernels' tiles that are chosen as one."""


class Boxes(Grid):
    """A grid whose tiles may hold more tokens than one tile of the kernels: not for operators."""

    _most_tokens: ClassVar[int] = MOST_TOKENS


@dataclass(frozen=True)
class Segment:
    """A part of a sequence that shares no tile with its neighbours.

    Args:
        shape: tokens, for a flat segment (text, audio); or (T, H, W), for a video or an image.
        tile: tokens per tile, at most 256: a number for a flat segment, by default 64; (t, h, w)
            for a video, by default (4, 4, 4), or "auto", which takes ``best_tile(shape)``. More
            than 64 are read as two to four tiles that are chosen as one.
        name: for errors and to find the segment again; no two segments share one.
        keys: "kept", for keys that every query attends, or "compete", for tiles that sparse queries
            choose among; by default a video's compete and a flat segment's are kept.
        queries: "sparse", for queries that attend what is kept and what their tile chooses, or
            "dense", for queries that attend the whole sequence; by default a video's are sparse and
            a flat segment's are dense.
        topk: how many of this segment's tiles each sparse query tile keeps, as in
            ``vsa.attention`` but no tensor. None: the segment's tiles compete for the call's
            ``topk`` together with those of all other segments without a budget of their own.
        coarse: whether its tiles take part in the coarse stage: their mean keys and values in its
            softmax, its queries by getting a coarse output. By default those do that compete or are
            sparse, which must. VSA-H3 sets it for all.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    shape: int | Extent
    tile: int | Extent | Literal["auto"] | None = None
    name: str | None = field(default=None, kw_only=True)
    keys: Literal["kept", "compete"] | None = field(default=None, kw_only=True)
    queries: Literal["dense", "sparse"] | None = field(default=None, kw_only=True)
    topk: TopK | None = field(default=None, kw_only=True)
    coarse: bool | None = field(default=None, kw_only=True)
    boxes: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flat = not isinstance(self.shape, (tuple, list))
        shape: int | Extent
        if flat:
            shape = checks.integer("shape", self.shape, at_least=1)
            tile = checks.integer("tile", SLOTS if self.tile is None else self.tile, at_least=1)
            if tile > MOST_TOKENS:
                raise ValueError(f"tile must hold at most {MOST_TOKENS} tokens, but it is {tile}")
            boxes: Grid = _boxes((1, 1, shape), (1, 1, tile))
            self._set("tile", tile)
        else:
            shape = checks.extent("shape", self.shape)
            boxes = _boxes(shape, (4, 4, 4) if self.tile is None else self.tile)
            given = isinstance(self.tile, (tuple, list))
            self._set("tile", tuple(self.tile) if given else boxes.tile)  # type: ignore[arg-type]
        self._set("shape", shape)
        self._set("boxes", boxes)
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise TypeError(f"name must be a word or None, but it is {self.name!r:.60}")
        self._set("keys", _one_of("keys", self.keys, ("kept", "compete"), flat))
        self._set("queries", _one_of("queries", self.queries, ("dense", "sparse"), flat))
        chooses = self.competes or self.is_sparse
        coarse = chooses if self.coarse is None else checks.flag("coarse", self.coarse)
        if chooses and not coarse:
            raise ValueError(
                "coarse may be False only where keys are kept and queries are dense, but keys is "
                f"{self.keys!r} and queries is {self.queries!r}"
            )
        self._set("coarse", coarse)
        self._set("topk", self._checked_topk())

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _checked_topk(self) -> TopK | None:
        if self.topk is None:
            return None
        if not self.competes:
            raise ValueError(
                f"topk must be None for a segment that does not compete, but it is {self.topk!r}: "
                "all of its keys are kept"
            )
        if isinstance(self.topk, Tensor):
            raise TypeError(
                "topk of a segment must be a number, a tuple of numbers or a vsa.TopP, but it is a "
                "tensor: leave it out and pass the tensor to the call"
            )
        topk = tuple(self.topk) if isinstance(self.topk, list) else self.topk
        heads = len(topk) if isinstance(topk, tuple) else 1
        if not isinstance(topk, budgets.LayerBudget):
            budgets.check(topk, heads)
        return topk

    @property
    def is_video(self) -> bool:
        """Whether its tokens have three axes."""
        return isinstance(self.shape, tuple)

    @property
    def competes(self) -> bool:
        """Whether sparse queries choose among its tiles."""
        return self.keys == "compete"

    @property
    def is_sparse(self) -> bool:
        """Whether its queries attend no more than what is kept and what their tile chooses."""
        return self.queries == "sparse"

    @property
    def is_text(self) -> bool:
        """Whether it is what ``Grid`` calls text, or could be: it chooses not and is not chosen."""
        return not self.competes and not self.is_sparse

    @property
    def tokens(self) -> int:
        """Its tokens."""
        return self.boxes.tokens

    @property
    def num_tiles(self) -> int:
        """Its tiles."""
        return self.boxes.num_tiles

    @property
    def parts(self) -> int:
        """Tiles of the kernels, 64 slots each, that one of its tiles takes."""
        return -(-math.prod(self.boxes.box) // SLOTS)


@dataclass(frozen=True)
class Sequence:
    """Segments one after the other, in the order of the sequence: a ``grid`` with many parts.

    ``vsa.attention(..., grid=sequence)`` and all that takes a grid take one; so does ``kv_grid``.
    A choice of tiles (``vsa.Selection``, ``must``) has a row for each tile whose queries are sparse
    and a column for each tile that competes, in the order of the sequence. See docs/sequences.md.

    Args:
        segments: ``Segment``s; a number stands for so many tokens, (T, H, W) for a video.

    Raises:
        ValueError, TypeError: naming the segment.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: Iterable[Segment | int | Extent]) -> None:
        if isinstance(segments, (str, Tensor, Segment, Grid)) or not isinstance(segments, Iterable):
            raise TypeError(
                "segments must be a list of vsa.Segment, numbers of tokens or (T, H, W), but it is "
                f"{segments!r:.60}"
            )
        found = tuple(
            each if isinstance(each, Segment) else _segment(place, each)
            for place, each in enumerate(segments)
        )
        if not found:
            raise ValueError("segments must hold at least one segment, but it is empty")
        names = [each.name for each in found if each.name is not None]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(
                f"segments must have names that differ, but two of them are named {twice[0]!r}"
            )
        object.__setattr__(self, "segments", found)

    @staticmethod
    def of(grid: Grid | Sequence) -> Sequence:
        """The same tokens and rules as a grid with its text."""
        if isinstance(grid, Sequence):
            return grid
        before = [Segment(grid.prefix)] if grid.prefix else []
        after = [Segment(grid.suffix)] if grid.suffix else []
        return Sequence([*before, Segment(grid.shape, grid.tile), *after])

    @property
    def length(self) -> int:
        """Tokens of all segments."""
        return sum(each.tokens for each in self.segments)

    @property
    def num_tiles(self) -> int:
        """Tiles of all segments."""
        return sum(each.num_tiles for each in self.segments)

    @property
    def query_tiles(self) -> int:
        """Tiles whose queries are sparse: rows of a choice."""
        return sum(each.num_tiles for each in self.segments if each.is_sparse)

    @property
    def key_tiles(self) -> int:
        """Tiles that compete: columns of a choice."""
        return sum(each.num_tiles for each in self.segments if each.competes)

    @property
    def text(self) -> int:
        """Tokens of all flat segments, which ``text_valid`` speaks of in their order."""
        return sum(each.tokens for each in self.segments if not each.is_video)

    def segment(self, name: str | int) -> Segment:
        """A segment by its name or place."""
        return self.segments[self._place(name)]

    def tokens_of(self, name: str | int) -> slice:
        """Positions of a segment in the sequence."""
        place = self._place(name)
        first = sum(each.tokens for each in self.segments[:place])
        return slice(first, first + self.segments[place].tokens)

    def query_tiles_of(self, name: str | int) -> slice:
        """Rows of a choice that are a segment's; none where its queries are dense."""
        place = self._place(name)
        counts = [each.num_tiles * each.is_sparse for each in self.segments]
        return slice(sum(counts[:place]), sum(counts[: place + 1]))

    def key_tiles_of(self, name: str | int) -> slice:
        """Columns of a choice that are a segment's; none where its keys are kept."""
        place = self._place(name)
        counts = [each.num_tiles * each.competes for each in self.segments]
        return slice(sum(counts[:place]), sum(counts[: place + 1]))

    def _place(self, name: str | int) -> int:
        names = [each.name for each in self.segments]
        if isinstance(name, str) and name in names:
            return names.index(name)
        if type(name) is int and 0 <= name < len(names):
            return name
        known = ", ".join(repr(each) for each in names if each is not None) or "none has a name"
        raise ValueError(
            f"name must be that of a segment ({known}) or a place below {len(names)}, but it is "
            f"{name!r:.60}"
        )

    def check_length(self, name: str, length: int, source: str = "its grid") -> None:
        """A sequence is as long as its segments are together.

        Args:
            name: of the argument that the sequence belongs to.
            length: its tokens.
            source: where the segments come from, for the sentence.

        Raises:
            ValueError: it is longer or shorter.
        """
        if length != self.length:
            shapes = " + ".join(
                "*".join(map(str, each.shape)) if isinstance(each.shape, tuple) else str(each.shape)
                for each in self.segments
            )
            raise ValueError(
                f"{name} has {length} tokens in its sequence, but the segments of {source} have "
                f"{self.length}: {shapes}"
            )


def _segment(place: int, shape: object) -> Segment:
    """From a shape alone."""
    if isinstance(shape, (str, Grid, Tensor)):
        raise TypeError(
            f"segments[{place}] must be a vsa.Segment, a number of tokens or (T, H, W), but it is "
            f"{shape!r:.60}"
        )
    try:
        return Segment(shape)  # type: ignore[arg-type]
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"segments[{place}]: {wrong}") from None


def _boxes(shape: Extent, tile: object) -> Grid:
    """A ``Grid`` wherever its tiles are no larger than the kernels', else ``Boxes``."""
    if not isinstance(tile, (tuple, list)):
        return Grid(shape, tile)  # type: ignore[arg-type]
    sides = checks.tile("tile", tile, MOST_TOKENS)
    clipped = tuple(map(min, sides, shape))
    if math.prod(clipped) > SLOTS:
        return Boxes(shape, sides)
    return Grid(shape, clipped if math.prod(sides) > SLOTS else sides)  # type: ignore[arg-type]


def _one_of(name: str, value: object, words: tuple[str, str], flat: bool) -> str:
    """One of two words; without one, the first for a flat segment and the second for a video."""
    if value is None:
        return words[0] if flat else words[1]
    if value not in words:
        raise ValueError(f"{name} must be {words[0]!r} or {words[1]!r}, but it is {value!r:.60}")
    return str(value)
