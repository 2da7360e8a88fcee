# SPDX-License-Identifier: Apache-2.0
"""A whole call of attention as one operator, for compiled code on backends that fuse gates.

Compiled code cannot use the plans of ``vsa.stages.eager``: it would look for one at every call, in
Python that the compiler cannot see through. This operator finds its plan inside, so that a call
costs one dispatch and one crossing into C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends import named
from vsa.operators.schema import differentiable, operator
from vsa.values import bitmap
from vsa.values.problem import Upstream, WholeCall, WholeSaved

WHOLE = (WholeCall,)


def _results(call: WholeCall) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and bitmap, empty."""
    q, (grid, kv_grid) = call.q, call.grids
    batch, length, heads = q.shape[:3]
    words = bitmap.num_words(kv_grid.num_tiles)
    return (
        q.new_empty(q.shape),
        q.new_empty(batch, heads, length, dtype=torch.float32),
        q.new_empty(batch, heads, grid.num_tiles, words, dtype=torch.int32),
    )


def _results_and_saved(call: WholeCall) -> tuple[Tensor, ...]:
    """Those, and what else a backward needs, empty."""
    q, k, (grid, kv_grid) = call.q, call.k, call.grids
    gated = call.gate_fine is not None or call.gate_coarse is not None
    fine = q.new_empty(q.shape if gated else 0)
    batch, _, heads, head_dim = q.shape
    rows, columns = heads * grid.num_tiles, 2 * k.shape[2] * kv_grid.num_tiles
    coarse, means = q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    if call.gate_coarse is not None:
        coarse = coarse.new_empty(batch, heads, grid.num_tiles, head_dim)
        means = means.new_empty(batch * (rows + columns) * head_dim)
    return (*_results(call), fine, coarse, means)


# Out like q, contiguous; lse (B, heads, S_q) fp32; the choice as a bitmap (B, heads, n_q, words)
# int32; then, without gradients, what the backward needs: the fine stage's output before gates
# (empty where out is that), the coarse attention's output, and the numbers of all tile means.
attention = operator(
    "attention",
    WHOLE,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute=lambda call: named(call.backend).whole_forward(call),
    fake=_results_and_saved,
)

# The same bits where no gradient is wanted.
attention_inference = operator(
    "attention_inference",
    WHOLE,
    "(Tensor, Tensor, Tensor)",
    compute=lambda call: named(call.backend).whole_inference(call),
    fake=_results,
)


def _like(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous and empty, of no elements for None."""
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in (x, *others))


# dq, dk, dv, dgate_fine, dgate_coarse: like what they belong to, contiguous; empty where that was
# None.
attention_backward = operator(
    "attention_backward",
    (Upstream, WholeSaved, *WHOLE),
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, call: tuple(
        call.q.new_empty(0) if grad is None else grad
        for grad in named(call.backend).whole_backward(upstream, saved, call)
    ),
    fake=lambda upstream, saved, call: _like(
        call.q, call.k, call.v, call.gate_fine, call.gate_coarse
    ),
)


def _saved(results: Sequence[Tensor]) -> WholeSaved:
    out, lse, chosen, fine, coarse, means = results
    return WholeSaved(fine if fine.numel() else out, lse, chosen, coarse, means)


differentiable(
    attention,
    WHOLE,
    attention_backward,
    of=("q", "k", "v", "gate_fine", "gate_coarse"),
    saved=_saved,
    hidden=slice(2, 6),
)
