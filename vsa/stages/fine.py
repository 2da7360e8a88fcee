# SPDX-License-Identifier: Apache-2.0
"""fine: exact softmax attention of every token over the tokens of its tile's selected key tiles.

Paper, section 2.2, fine stage. Text queries attend everything; video queries attend the valid text
besides their tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends import named
from vsa.operators import fine as operators
from vsa.operators import padded as padded_operators
from vsa.operators.low_precision import low_precision_attention
from vsa.stages.coarse import tile_means
from vsa.stages.inputs import Inputs
from vsa.values.problem import PaddedProblem, Problem, TailMeans
from vsa.values.selection import Selection


def fine(
    call: Inputs, selection: Selection, tail: TailMeans | None = None
) -> tuple[Tensor, Tensor]:
    """The fine stage on checked inputs.

    Args:
        call: checked inputs.
        selection: the key tiles of every query tile.
        tail: tile means of the keys, if tiles that were not chosen enter the softmax by them.

    Returns:
        out: (B, S, heads, head_dim), the type of q; zeros where a token attends nothing.
        lse: (B, heads, S) fp32 (fp64 for fp64 inputs), natural logarithm; -inf where a token
            attends nothing.
    """
    most = selection.num_key_tiles if selection.most is None else selection.most
    if call.precision != "native":
        with torch.autocast(call.q.device.type, enabled=False):
            return low_precision_attention(*problem(call, selection), call.precision, most)
    who = named(call.backend)
    if tail is not None:
        asked = problem(call, selection)
        if "forward" in who.composed:
            return who.tail_forward(asked, tail, most)
        return operators.tail_attention(*asked, *tail, most)
    if "forward" in who.composed:
        return who.forward(problem(call, selection), most)
    return operators.block_sparse_attention(*problem(call, selection), most)


def problem(call: Inputs, selection: Selection) -> Problem:
    """What the operators of this stage are given."""
    return Problem(
        call.q,
        call.k,
        call.v,
        selection.bitmap,
        call.text_valid,
        call.grid.as_ints(),
        call.kv_grid.as_ints(),
        call.scale,
        call.backend,
        *(call.mask or ()),
    )


def fine_of_padded(problem: PaddedProblem) -> tuple[Tensor, Tensor]:
    """The fine stage over padded tiles: out (B, S_q, heads, head_dim) and lse (B, heads, S_q)."""
    who, most = named(problem.backend), len(problem.kv_sizes)
    if "forward" in who.composed:
        return who.forward(problem, most)
    return padded_operators.padded_attention(*problem, most)


def tail_means(call: Inputs) -> TailMeans:
    """Tile means of the keys, for a tail.

    Their gradient comes through autograd where the fine stage is composed of PyTorch's operators.
    Elsewhere it is in that of k and v, and none comes here.
    """
    return TailMeans(*tile_means((call.k, call.v), (call.kv_grid, call.kv_grid), call.backend))


def video_lse(call: Inputs, selection: Selection) -> Tensor:
    """Log-sum-exp of the video's queries over the selected tiles, (B, heads, tokens)."""
    _, lse = fine(call, selection)
    return lse[..., call.grid.prefix : call.grid.prefix + call.grid.tokens]
