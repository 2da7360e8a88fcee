# SPDX-License-Identifier: Apache-2.0
"""The backends that consist of PyTorch's operators: ``torch``, and what follows transforms."""

from __future__ import annotations

from torch import Tensor

from vsa.backends import composed, torch_fine
from vsa.backends.base import Backend, Request
from vsa.values import transforms
from vsa.values.problem import Problem, Saved, SubBlockScores, TileScores, Upstream


class TorchBackend(Backend):
    """PyTorch on any device: gathers the selected tiles, so its cost is sparse."""

    def why_not(self, request: Request) -> str | None:
        """Nothing is missing anywhere."""
        return None

    def forward(self, problem: Problem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return torch_fine.forward(problem, most)

    def backward(
        self, upstream: Upstream, saved: Saved, problem: Problem, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.backward``."""
        return torch_fine.backward(upstream, saved, problem, most)


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
        exact: bool = False,
    ) -> Tensor:
        """Written out: PyTorch's fused attention has no forward-mode derivative."""
        return composed.coarse_attention(q_means, k_means, v_means, scale)

    def forward(self, problem: Problem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return composed.forward(problem, most)
