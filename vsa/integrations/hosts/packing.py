# SPDX-License-Identifier: Apache-2.0
"""What a host's builder of MiniMax-H3's metadata was given, noted on what it makes.

Both hosts tile the whole packed sequence by indices that their builders make, and keep neither the
segments nor the grids.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import vsa
from vsa.integrations.hosts import aside, raster
from vsa.values.grid import Extent

NOTE = "vsa_packing"


class Mixed(NamedTuple):
    """A call over a sequence in which more than one segment competes.

    Attributes:
        sequence: the segments, as the host packs them.
        topk: of the call; None where all that compete have budgets of their own.
    """

    sequence: vsa.Sequence
    topk: int | None


class Packing(NamedTuple):
    """What a builder was given.

    Attributes:
        segments: tokens of each segment before the video, and (T, H, W) of each reference video
            among them, in the order of the sequence.
        grid: (T, H, W) of the video, the last.
        tile: tokens of a tile along (t, h, w).
        sparse: the call of layers that choose, where the video is not all that competes; else None.
        dense: the same of layers that keep everything.
    """

    segments: tuple[int | Extent, ...]
    grid: Extent
    tile: Extent
    sparse: Mixed | None
    dense: Mixed | None


def build(theirs: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The builder's ``build``, with a note of what it was given; ``theirs`` is the host's own.

    Sequences are made here, since a layer's compiled code takes them as constants.
    """
    signature = inspect.signature(theirs)
    bound = signature.bind(*args, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    metadata = theirs(*args, **keywords)
    patches = given["patch_size"]
    shape = [size // patch for size, patch in zip(given["raw_latent_shape"], patches, strict=True)]
    grid = raster.extent("raw_latent_shape over patch_size", shape)
    packed = given.get("packed_segments")
    before = given["prefix_segments"] if packed is None else packed[:-1]
    segments = tuple(
        raster.extent("packed_segments", each) if isinstance(each, tuple) else int(each)
        for each in before
        if isinstance(each, tuple) or each > 0
    )
    module = sys.modules[theirs.__module__]
    tile = vars(module)["VSA_H3_TILE_SHAPES"][int(given["tile_size"])]
    exempt = bool(given["exempt"])
    references = any(isinstance(each, tuple) for each in segments)
    if not exempt and getattr(metadata, "uses_regions", False):
        aside.warn_once(
            f"vsa: vsa_mode='compete' changes nothing with tiles of {given['tile_size']} tokens, "
            "in SGLang as here: segments before the video are kept beside its budget",
            theirs.__module__,
        )
        exempt = True
    sparse = dense = None
    if references or (segments and not exempt):
        rate = given.get("ref_keep_rate")
        kept = 1.0 if rate is None else float(rate)
        sparse, dense = (
            _mixed(segments, grid, tile, exempt, sparsity, kept)
            for sparsity in (float(metadata.VSA_sparsity), 0.0)
        )
    setattr(metadata, NOTE, Packing(segments, grid, tile, sparse, dense))
    return metadata


@functools.lru_cache(maxsize=64)  # compiled code knows a sequence by its identity
def _mixed(
    segments: tuple[int | Extent, ...],
    grid: Extent,
    tile: Extent,
    exempt: bool,
    sparsity: float,
    reference_share: float,
) -> Mixed:
    """The host's budgets as those of segments.

    With segments that are kept, each video has a budget of its own. With segments that compete,
    all tiles share one, which counts the video's and those of the segments.
    """
    volume = math.prod(tile)
    flat: Literal["kept", "compete"] = "kept" if exempt else "compete"
    found = [
        vsa.Segment(each, volume, keys=flat, coarse=True)
        if isinstance(each, int)
        else vsa.Segment(each, tile, topk=_kept(each, tile, sparsity, 1.0 - reference_share))
        for each in segments
    ]
    topk = _kept(grid, tile, sparsity, sparsity)
    if exempt:
        return Mixed(vsa.Sequence([*found, vsa.Segment(grid, tile, topk=topk)]), None)
    beside = sum(each.num_tiles for each in found)
    return Mixed(vsa.Sequence([*found, vsa.Segment(grid, tile)]), topk + beside)


def _kept(grid: Extent, tile: Extent, sparsity: float, own: float) -> int:
    """Tiles of a video that a row keeps; a layer without sparsity keeps all of every video."""
    return raster.tiles_kept(own if sparsity > 0 else 0.0, raster.tiles_of(grid, tile))
