# SPDX-License-Identifier: Apache-2.0
"""The fine stage as operators, with and without the coarse branch and gates on top.

``gated_attention`` is one operator, because all that needs a gradient then comes out of the same
passes: the gradients of the gates, of the coarse output, and what the fine stage's backward needs
of every query, out of one pass over the tokens; the gradients of q, k and v that come through the
tile means, where the fine stage's gradients are stored.
"""

from __future__ import annotations

from torch import Tensor

from vsa.backends import named
from vsa.backends.tiles import accumulation_dtype
from vsa.operators.schema import cast_under_autocast, differentiable, operator
from vsa.values.problem import (
    FineProblem,
    Gates,
    Means,
    Problem,
    RowBound,
    Saved,
    TailMeans,
    Upstream,
)


def outputs(problem: FineProblem, *_: object) -> tuple[Tensor, Tensor]:
    """Out (B, S_q, heads, head_dim) and lse (B, heads, S_q), empty."""
    q = problem.q
    batch, length, heads = q.shape[:3]
    lse = q.new_empty(batch, heads, length, dtype=accumulation_dtype(q))
    return q.new_empty(q.shape), lse


def like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous and empty, of no elements for None."""
    q = tensors[0]
    assert q is not None
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


FINE = (Problem, RowBound)

# Exact attention over the selected key tiles: out like q, contiguous, zeros where a token attends
# nothing; lse in natural logarithms, -inf where a token attends nothing.
block_sparse_attention = operator(
    "block_sparse_attention",
    FINE,
    "(Tensor, Tensor)",
    compute=lambda problem, bound: named(problem.backend).forward(problem, bound.most),
    fake=outputs,
)

# dq, dk, dv: like q, k and v, contiguous.
block_sparse_attention_backward = operator(
    "block_sparse_attention_backward",
    (Upstream, Saved, *FINE),
    "(Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, bound: named(problem.backend).backward(
        upstream, saved, problem, bound.most
    ),
    fake=lambda upstream, saved, problem, bound: like(problem.q, problem.k, problem.v),
)
differentiable(
    block_sparse_attention,
    FINE,
    block_sparse_attention_backward,
    of=("q", "k", "v"),
    saved=lambda results: results[:2],
)
cast_under_autocast(block_sparse_attention, "block_sparse_attention", count=3)


TAILED = (Problem, TailMeans, RowBound)

# The same with a tail: tiles that a query tile does not choose enter its softmax as one key each,
# their mean, that counts as often as the tile has tokens. Out and lse are those of the whole.
tail_attention = operator(
    "tail_attention",
    TAILED,
    "(Tensor, Tensor)",
    compute=lambda problem, means, bound: named(problem.backend).tail_forward(
        problem, means, bound.most
    ),
    fake=outputs,
)

# dq, dk, dv: like q, k and v, contiguous; what reaches k and v through the means is in them.
tail_attention_backward = operator(
    "tail_attention_backward",
    (Upstream, Saved, *TAILED),
    "(Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, means, bound: named(problem.backend).tail_backward(
        upstream, saved, problem, means, bound.most
    ),
    fake=lambda upstream, saved, problem, *_: like(problem.q, problem.k, problem.v),
)
differentiable(
    tail_attention,
    TAILED,
    tail_attention_backward,
    of=("q", "k", "v"),
    saved=lambda results: results[:2],
)


GATED = (Problem, Means, Gates)

# gate_fine * fine + gate_coarse * coarse[tile of the token]: out and lse as above, and the fine
# stage's part before its gate, which is kept for the backward and has no gradient.
gated_attention = operator(
    "gated_attention",
    GATED,
    "(Tensor, Tensor, Tensor)",
    compute=lambda problem, means, gates: named(problem.backend).gated_forward(problem, gates),
    fake=lambda problem, *_: (*outputs(problem), problem.q.new_empty(problem.q.shape)),
)

# The same bits where no gradient is wanted: the fine stage's part is not written.
gated_attention_inference = operator(
    "gated_attention_inference",
    (Problem, Gates),
    "(Tensor, Tensor)",
    compute=lambda problem, gates: named(problem.backend).gated_inference(problem, gates),
    fake=outputs,
)

# dq, dk, dv, dgate_fine, dgate_coarse: like what they belong to, contiguous; empty where that was
# None. What reaches q, k and v through the tile means is in the first three.
gated_attention_backward = operator(
    "gated_attention_backward",
    (Upstream, Saved, *GATED),
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, means, gates: tuple(
        problem.q.new_empty(0) if grad is None else grad
        for grad in named(problem.backend).gated_backward(upstream, saved, problem, means, gates)
    ),
    fake=lambda upstream, saved, problem, means, gates: like(
        problem.q, problem.k, problem.v, gates.gate_fine, gates.gate_coarse
    ),
)
differentiable(
    gated_attention,
    GATED,
    gated_attention_backward,
    of=("q", "k", "v", "gate_fine", "gate_coarse"),
    saved=lambda results: (results[2], results[1]),  # the fine stage's part, then lse
    hidden=slice(2, 3),
)


GATED_TAILED = (Problem, TailMeans, Means, Gates)

# The three of them with a tail: lse and the fine stage's part are those of the whole softmax.
gated_tail_attention = operator(
    "gated_tail_attention",
    GATED_TAILED,
    "(Tensor, Tensor, Tensor)",
    compute=lambda problem, tail, means, gates: named(problem.backend).gated_forward(
        problem, gates, tail
    ),
    fake=lambda problem, *_: (*outputs(problem), problem.q.new_empty(problem.q.shape)),
)
gated_tail_attention_inference = operator(
    "gated_tail_attention_inference",
    (Problem, TailMeans, Gates),
    "(Tensor, Tensor)",
    compute=lambda problem, tail, gates: named(problem.backend).gated_inference(
        problem, gates, tail
    ),
    fake=outputs,
)
gated_tail_attention_backward = operator(
    "gated_tail_attention_backward",
    (Upstream, Saved, *GATED_TAILED),
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, tail, means, gates: tuple(
        problem.q.new_empty(0) if grad is None else grad
        for grad in named(problem.backend).gated_backward(
            upstream, saved, problem, means, gates, tail
        )
    ),
    fake=lambda upstream, saved, problem, tail, means, gates: like(
        problem.q, problem.k, problem.v, gates.gate_fine, gates.gate_coarse
    ),
)
differentiable(
    gated_tail_attention,
    GATED_TAILED,
    gated_tail_attention_backward,
    of=("q", "k", "v", "gate_fine", "gate_coarse"),
    saved=lambda results: (results[2], results[1]),
    hidden=slice(2, 3),
)
