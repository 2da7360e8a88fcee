# SPDX-License-Identifier: Apache-2.0
"""The backends that consist of PyTorch's operators: ``torch``, and what follows transforms."""

from __future__ import annotations

from torch import Tensor

from vsa.backends import composed, torch_fine, torch_low_precision, torch_tail
from vsa.backends.base import Backend, Request
from vsa.backends.tiles import accumulation_dtype
from vsa.values import transforms
from vsa.values.problem import (
    FineProblem,
    Problem,
    Saved,
    SubBlockScores,
    TailMeans,
    TileScores,
    Upstream,
)
from vsa.values.tile_mask import TileMask


class TorchBackend(Backend):
    """PyTorch on any device: gathers the selected tiles, so its cost is sparse."""

    def why_not(self, request: Request) -> str | None:
        """Nothing is missing anywhere."""
        return None

    def forward(self, problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return torch_fine.forward(problem, most)

    def backward(
        self, upstream: Upstream, saved: Saved, problem: FineProblem, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.backward``."""
        return torch_fine.backward(upstream, saved, problem, most)

    def low_precision(self, problem: Problem, precision: str, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.low_precision``: the kernels' scales and roundings, simulated."""
        return torch_low_precision.forward(problem, precision, most)

    def tail_forward(self, problem: Problem, means: TailMeans, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.tail_forward``; rounded once, as without a tail."""
        out, lse = super().tail_forward(_widened(problem), means, most)
        return out.to(problem.q.dtype), lse

    def tail_backward(
        self, upstream: Upstream, saved: Saved, problem: Problem, means: TailMeans, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.tail_backward``; rounded once, as without a tail."""
        dq, dk, dv = super().tail_backward(upstream, saved, _widened(problem), means, most)
        dtype = problem.q.dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _widened(problem: Problem) -> Problem:
    """The same in the type that is computed in."""
    q, k, v = (x.to(accumulation_dtype(x)) for x in (problem.q, problem.k, problem.v))
    return problem._replace(q=q, k=k, v=v)


class TransformsBackend(TorchBackend):
    """For tensors with forward-mode tangents or inside of torch.func: nothing is an operator.

    It has derivatives of any order, at more memory.
    """

    composed = frozenset(
        {"tile_means", "select", "select_by_sub_blocks", "coarse_attention", "forward"}
    )

    def select(
        self, scores: TileScores, v_means: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The choice from the numbers of the means alone: nothing flows through it."""
        q_means, k_means = transforms.primal(scores.q_means), transforms.primal(scores.k_means)
        with transforms.outside():
            return super().select(scores._replace(q_means=q_means, k_means=k_means), v_means)

    def select_by_sub_blocks(
        self, asked: SubBlockScores, v: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Likewise, from the numbers of queries and keys."""
        q, k = transforms.primal(asked.q), transforms.primal(asked.k)
        with transforms.outside():
            return super().select_by_sub_blocks(asked._replace(q=q, k=k), v)

    def coarse_attention(
        self,
        q_means: Tensor,
        k_means: Tensor,
        v_means: Tensor,
        scale: float,
        mask: TileMask | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Written out: PyTorch's fused attention has no forward-mode derivative."""
        return composed.coarse_attention(q_means, k_means, v_means, scale, mask)

    def forward(self, problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return composed.forward(problem, most)

    def tail_forward(self, problem: Problem, means: TailMeans, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.tail_forward``."""
        wide = _widened(problem)
        out, lse = torch_tail.composed(wide, means, *self.forward(wide, most))
        return out.to(problem.q.dtype), lse
