# SPDX-License-Identifier: Apache-2.0
"""A host's call on tokens in raster order: its budget, its tile and its gate, by our attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

import vsa
from vsa.integrations.hosts import large_tiles
from vsa.values.grid import SLOTS, Extent


def tiles_kept(sparsity: float, num_tiles: int) -> int:
    """Key tiles per query tile by ``VSA_sparsity``, as FastVideo and SGLang round it.

    In floating point 1 - 0.7 is a little more than 0.3, so that 0.7 keeps 4 of 10 tiles: a share
    of 0.3 given to ``vsa.attention`` would keep 3. What is below 0 keeps all, as with them.

    Raises:
        ValueError: no number, or one above 1, of which they would keep one tile.
    """
    if not isinstance(sparsity, int | float | Tensor) or sparsity != sparsity:
        raise ValueError(f"VSA_sparsity must be a number, but it is {sparsity!r}")
    if sparsity > 1:
        raise ValueError(
            f"VSA_sparsity must be at most 1, the share of tiles that are left out, but it is "
            f"{sparsity}: 80 % is 0.8"
        )
    return max(1, min(math.ceil((1 - sparsity) * num_tiles), num_tiles))


def tiles_of(grid: Extent, tile: Extent) -> int:
    """How many tiles of the caller's cut a grid into."""
    t, h, w = (-(-extent // size) for extent, size in zip(grid, tile, strict=True))
    return t * h * w  # torch.compile breaks a graph at math.prod of a generator


def scale_of(
    host: str, head_size: int, causal: bool = False, softmax_scale: float | None = None
) -> float:
    """The scale of FastVideo's and SGLang's VSA layers, which is always the same.

    Raises:
        ValueError: a causal layer, or another scale; their kernels would ignore both.
    """
    if causal:
        raise ValueError(f"causal must be False: {host}'s VSA layers have no causal mask")
    usual = head_size**-0.5
    if softmax_scale is not None and not math.isclose(softmax_scale, usual, rel_tol=1e-6):
        raise ValueError(
            f"softmax_scale must be head_size ** -0.5 = {usual:.6g}, which {host}'s VSA "
            f"kernels use whatever they are given, but it is {softmax_scale}"
        )
    return usual if softmax_scale is None else softmax_scale


def extent(name: str, value: object) -> Extent:
    """Three token counts along (t, h, w), as hosts give them: a tuple, a list or a tensor.

    Raises:
        ValueError: anything else; the sentence names it.
    """
    counts = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(counts, tuple | list) or len(counts) != 3 or not all(map(_counts, counts)):
        raise ValueError(f"{name} must be three token counts along (t, h, w), but it is {value!r}")
    return int(counts[0]), int(counts[1]), int(counts[2])


def _counts(number: object) -> bool:
    """Whether it is a whole number of tokens, also one of NumPy's; True is none."""
    whole = isinstance(number, int) or hasattr(type(number), "__index__")
    return whole and not isinstance(number, bool) and number >= 1  # type: ignore[operator]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    grid: Extent,
    tile: Extent,
    gate: Tensor | None,
    segments: Sequence[int] = (),
    scale: float | None = None,
    named: str = "dit_seq_shape",
) -> Tensor:
    """Sparse attention of a video's tokens where they lie, without padding or gathers.

    Args:
        q: (B, S, heads, head_dim), segments and then the video in raster order; any strides but of
            the last dimension.
        k: (B, S, kv_heads, head_dim); kv_heads divides heads.
        v: like k.
        topk: the host's tiles per query tile; clamped to their number.
        grid: (T, H, W) of the video, the last T * H * W tokens.
        tile: tokens of the host's tile along (t, h, w): 64 in all, or 128 or 256, which are two or
            four tiles of 64 that share a choice.
        gate: factor of the coarse output, broadcastable to q; None leaves it out.
        segments: tokens of each segment before the video, with tiles of its own; all queries keep
            them, and theirs keep everything.
        scale: factor of the scores, by default head_dim ** -0.5.
        named: what the host calls the grid, for the error sentence.

    Returns:
        (B, S, heads, head_dim).

    Raises:
        ValueError, TypeError: what does not fit, in one sentence.
    """
    tokens = sum(segments) + math.prod(grid)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim != 4 or x.shape[1] != tokens:
            raise ValueError(
                f"{name} must be (B, S, heads, head_dim) with S = {tokens}, the tokens of "
                f"{named} {grid} and of segments {tuple(segments)} before them, but its shape is "
                f"{tuple(x.shape)}: other tokens beside the video, and padding of a sequence that "
                "was cut into ranks, have no place in this call"
            )
    if math.prod(tile) > SLOTS or (segments and gate is not None):
        return large_tiles.attention(
            q, k, v, topk, grid=grid, tile=tile, gate=gate, segments=segments, scale=scale
        )
    cut = vsa.Grid(grid, tile=tile, prefix=sum(segments))
    return vsa.attention(q, k, v, topk, grid=cut, gate_coarse=gate, scale=scale)
