# SPDX-License-Identifier: Apache-2.0
"""The fine stage in eight bits, for inference, as operators without a backward."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa.backends import named
from vsa.operators.schema import operator
from vsa.values.problem import EightBits, Gates, Problem, RowBound


def _outputs(problem: Problem, *_: object) -> tuple[Tensor, Tensor]:
    """Out (B, S_q, heads, head_dim) and lse (B, heads, S_q), empty."""
    q = problem.q
    batch, length, heads = q.shape[:3]
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


# Out like q, contiguous, zeros where a token attends nothing; lse in natural logarithms, -inf where
# a token attends nothing.
low_precision_attention = operator(
    "low_precision_attention",
    (Problem, EightBits, RowBound),
    "(Tensor, Tensor)",
    compute=lambda problem, bits, bound: named(problem.backend).low_precision(
        problem, bits.precision, bound.most
    ),
    fake=_outputs,
)

# gate_fine * fine + gate_coarse * coarse[tile of the token], where gates are fused.
gated_low_precision_attention = operator(
    "gated_low_precision_attention",
    (Problem, EightBits, Gates),
    "(Tensor, Tensor)",
    compute=lambda problem, bits, gates: named(problem.backend).gated_low_precision(
        problem, bits.precision, gates
    ),
    fake=_outputs,
)
