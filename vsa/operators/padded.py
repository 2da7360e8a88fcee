# SPDX-License-Identifier: Apache-2.0
"""The operators over padded tiles: those of ``coarse_select`` and ``fine`` for another problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.backends import named
from vsa.backends.tiles import accumulation_dtype
from vsa.operators import fine
from vsa.operators.schema import differentiable, operator
from vsa.values.problem import Gates, Means, PaddedProblem, RowBound, Saved, Upstream


@torch.library.custom_op("vsa::padded_tile_means", mutates_args=())
def padded_tile_means(xs: Sequence[Tensor], sizes: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Mean of the real tokens of every padded tile, zero where there are none.

    Args:
        xs: (B, 64 * n, heads, head_dim) each, any strides.
        sizes: (n,) int32 of each, real tokens of its tiles.
        backend: name of the backend that computes it, never "auto".

    Returns:
        (B, heads, n, head_dim) each, fp32 (fp64 for fp64 inputs), contiguous.
    """
    return named(backend).padded_tile_means(xs, sizes)


@padded_tile_means.register_fake
def _(xs, sizes, backend):
    return [
        x.new_empty(x.shape[0], x.shape[2], len(of), x.shape[3], dtype=accumulation_dtype(x))
        for x, of in zip(xs, sizes, strict=True)
    ]


def _save_sizes(ctx, inputs, output):
    xs, sizes, ctx.backend = inputs
    ctx.save_for_backward(*sizes)
    ctx.dtypes = [x.dtype for x in xs]
    ctx.set_materialize_grads(False)


def _spread_means(ctx, grads):
    each = zip(grads, ctx.saved_tensors, ctx.dtypes, strict=True)
    spread = named(ctx.backend).spread_padded_means
    spread_grads = [None if grad is None else spread(grad, *x) for grad, *x in each]
    return spread_grads, [None] * len(grads), None


padded_tile_means.register_autograd(_spread_means, setup_context=_save_sizes)


FINE = (PaddedProblem, RowBound)

# Results as those of the operators without "padded" in vsa.operators.fine; rows of padding are
# zeros in out and in gradients, and -inf in lse.
padded_attention = operator(
    "padded_attention",
    FINE,
    "(Tensor, Tensor)",
    compute=lambda problem, bound: named(problem.backend).forward(problem, bound.most),
    fake=fine.outputs,
)
padded_attention_backward = operator(
    "padded_attention_backward",
    (Upstream, Saved, *FINE),
    "(Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, bound: named(problem.backend).backward(
        upstream, saved, problem, bound.most
    ),
    fake=lambda upstream, saved, problem, bound: fine.like(problem.q, problem.k, problem.v),
)
differentiable(
    padded_attention,
    FINE,
    padded_attention_backward,
    of=("q", "k", "v"),
    saved=lambda results: results[:2],
)


GATED = (PaddedProblem, Means, Gates)

padded_gated_attention = operator(
    "padded_gated_attention",
    GATED,
    "(Tensor, Tensor, Tensor)",
    compute=lambda problem, means, gates: named(problem.backend).gated_forward(problem, gates),
    fake=lambda problem, *_: (*fine.outputs(problem), problem.q.new_empty(problem.q.shape)),
)
padded_gated_attention_inference = operator(
    "padded_gated_attention_inference",
    (PaddedProblem, Gates),
    "(Tensor, Tensor)",
    compute=lambda problem, gates: named(problem.backend).gated_inference(problem, gates),
    fake=fine.outputs,
)
padded_gated_attention_backward = operator(
    "padded_gated_attention_backward",
    (Upstream, Saved, *GATED),
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute=lambda upstream, saved, problem, means, gates: tuple(
        problem.q.new_empty(0) if grad is None else grad
        for grad in named(problem.backend).gated_backward(upstream, saved, problem, means, gates)
    ),
    fake=lambda upstream, saved, problem, means, gates: fine.like(
        problem.q, problem.k, problem.v, gates.gate_fine, gates.gate_coarse
    ),
)
differentiable(
    padded_gated_attention,
    GATED,
    padded_gated_attention_backward,
    of=("q", "k", "v", "gate_fine", "gate_coarse"),
    saved=lambda results: (results[2], results[1]),
    hidden=slice(2, 3),
)
