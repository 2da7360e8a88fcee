# SPDX-License-Identifier: Apache-2.0
"""fine: exact softmax attention of every token over the tokens of its tile's selected key tiles.

Paper, section 2.2, fine stage. Text queries attend everything; video queries attend the valid text
besides their tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vsa import ops
from vsa.backends import composite, flex
from vsa.backends.layout import Plan
from vsa.stages import inputs
from vsa.values import checks
from vsa.values.grid import Extent, Grid

if TYPE_CHECKING:
    from vsa.stages.select import Selection


def fine(call: inputs.Inputs, selection: Selection) -> tuple[Tensor, Tensor]:
    """The fine stage on checked inputs.

    Returns:
        out: (B, S, heads, head_dim), the type of q; zeros where a token attends nothing.
        lse: (B, heads, S) fp32 (fp64 for fp64 inputs), natural logarithm; -inf where a token
            attends nothing.
    """
    if call.transformed:
        plan = Plan(call.grid, call.kv_grid, most_kept(selection), call.scale)
        return composite.forward(call.q, call.k, call.v, selection.bitmap, call.text_valid, plan)
    if call.backend == "flex":
        return flex.attend(
            call.q,
            call.k,
            call.v,
            selection.bitmap,
            call.text_valid,
            call.grid,
            call.kv_grid,
            call.scale,
        )
    return ops.block_sparse_attention(
        call.q,
        call.k,
        call.v,
        selection.bitmap,
        call.text_valid,
        call.grid.as_ints(),
        call.kv_grid.as_ints(),
        most_kept(selection),
        call.scale,
        call.backend,
    )


def most_kept(selection: Selection) -> int:
    """An upper bound of the tiles that a row keeps."""
    return selection.num_key_tiles if selection.most is None else selection.most


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    grid: Extent | Grid | None = None,
    kv_grid: Extent | Grid | None = None,
    tile: inputs.Tile = inputs.DEFAULT_TILE,
    scale: float | None = None,
    text_valid: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """The fine stage alone: attention over given tiles, differentiable in q, k and v.

    Args:
        q: (B, T, H, W, heads, head_dim) or (B, S, heads, head_dim).
        k: likewise with the keys' grid; its heads divide those of q.
        v: like k.
        selection: the key tiles of every query tile.
        grid: the queries' grid, unless the selection knows it or q is video-shaped.
        kv_grid: the keys' grid where it differs.
        tile: tokens per tile along (t, h, w) where ``grid`` is not a ``vsa.Grid``.
        scale: factor of the scores, by default head_dim ** -0.5.
        text_valid: (B, prefix + suffix) bool, which text tokens are real.
        return_lse: also return the log-sum-exp, itself differentiable.
        backend: "auto", "hopper", "emulated", "flex" or "torch".

    Returns:
        out like q, and with ``return_lse`` (B, heads, S) fp32 in natural logarithms.

    Raises:
        ValueError, TypeError: bad input, in one sentence that names the argument.
        RuntimeError: an explicit backend that cannot run here.
    """
    checks.is_selection(selection)
    call = inputs.resolve(
        q,
        k,
        v,
        grid=grid,
        kv_grid=kv_grid,
        tile=tile,
        scale=scale,
        text_valid=text_valid,
        selection=selection,
        backend=backend,
    )
    out, lse = fine(call, selection.savable())
    out = out.view(call.shape)
    return (out, lse) if return_lse else out
