# SPDX-License-Identifier: Apache-2.0
"""Attention layers of video models by name, and sweeps: what commands run on."""

from __future__ import annotations

from dataclasses import dataclass

from vsa.values.grid import Grid


@dataclass(frozen=True)
class Shape:
    """One self-attention layer.

    Attributes:
        grid: its tokens, text included, in tiles of 4x4x4.
        heads: query, key and value heads.
        head_dim: channels of a head.
    """

    grid: Grid
    heads: int
    head_dim: int


_WAN_480P, _WAN_720P = Grid((21, 30, 52)), Grid((21, 45, 80))

SHAPES = {
    "wan-1.3b-480p": Shape(_WAN_480P, 12, 128),
    "wan-1.3b-720p": Shape(_WAN_720P, 12, 128),
    "wan-14b-480p": Shape(_WAN_480P, 40, 128),
    "wan-14b-720p": Shape(_WAN_720P, 40, 128),
    "hunyuan-544p": Shape(Grid((33, 34, 60), suffix=256), 24, 128),
    "hunyuan-720p": Shape(Grid((33, 45, 80), suffix=256), 24, 128),
    "cogvideox-2b": Shape(Grid((13, 30, 45), prefix=226), 30, 64),
    "cogvideox-5b": Shape(Grid((13, 30, 45), prefix=226), 48, 64),
    "cogvideox1.5-5b": Shape(Grid((11, 48, 85), prefix=226), 48, 64),
    "ltx-video": Shape(Grid((21, 16, 22)), 32, 64),
}
"""By name; the resolution and length of a clip are those that the model is known for."""

GRIDS = {name: shape.grid for name, shape in SHAPES.items()} | {
    "wan2.2-5b": Grid((31, 22, 40)),
    "fastvideo-448x832x77": Grid((20, 28, 52)),
    "fastwan-448x832x61": Grid((16, 28, 52)),
    "fastvideo-768x1280x77": Grid((20, 48, 80)),
    "hunyuan1.5-720p": Grid((31, 45, 80)),
    "hunyuan1.5-480p": Grid((31, 30, 53)),
    "ltx-2": Grid((16, 16, 24)),
    "mochi-163f": Grid((28, 30, 53)),
    "mochi-85f": Grid((15, 30, 53)),
}
"""Token grids of the shapes and of more models, whose results ``vsa check --shape`` looks at."""
PADDED_TEXT = frozenset({"hunyuan-720p", "hunyuan-544p"})
"""Whose text is filled up to its length: part of it is not real."""
ONE_KEY_HEAD = frozenset({"wan2.2-5b", "hunyuan-544p", "mochi-85f"})
"""Checked with one key head for all query heads; not the models' own, to have some."""

LENGTHS = (
    Grid((8, 32, 32)),
    Grid((16, 32, 32)),
    Grid((32, 32, 32)),
    Grid((32, 32, 64)),
    Grid((32, 64, 64)),
)
"""8k to 128k tokens without a clipped tile."""

CPU_LENGTHS = (
    Grid((4, 16, 16)),
    Grid((8, 16, 16)),
    Grid((8, 16, 32)),
    Grid((8, 32, 32)),
)
"""1k to 8k tokens without a clipped tile: what takes a CPU minutes."""

DENSITIES = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of key tiles, by factors of two."""


def by_name(name: str) -> Shape:
    """A shape of the table.

    Raises:
        ValueError: a name that is not there, with those that are.
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, but it is {name!r}")
    return SHAPES[name]
