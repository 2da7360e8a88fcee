# SPDX-License-Identifier: Apache-2.0
"""What a backend is: who can run a request, and all stages of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vsa.backends import torch_coarse, torch_padded, torch_sub_blocks, torch_tail
from vsa.backends.torch_combine import combine
from vsa.values.grid import Grid
from vsa.values.problem import (
    FineProblem,
    Gates,
    Means,
    Problem,
    Saved,
    SubBlockScores,
    TailMeans,
    TileScores,
    Upstream,
    WholeCall,
    WholeSaved,
)
from vsa.values.task import Task
from vsa.values.tile_mask import TileMask

Ready = Callable[[], None]
"""Makes the current stream wait for tensors that are still on their way."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to do.

    Attributes:
        device: device type, "cpu" or "cuda" for instance.
        index: which of that type, None for the current one.
        dtype: type of q, k and v; None when only the machine is asked about.
        head_dim: channels of a head, or None when only the machine is asked about.
        gradients: whether gradients are wanted.
        precision: "native", "int8" or "fp8".
        masked: whether there is a mask over tiles.
    """

    device: str
    index: int | None = None
    dtype: str | None = None
    head_dim: int | None = None
    gradients: bool = False
    precision: str = "native"
    masked: bool = False


class Backend:
    """One way of computing attention. This one computes all but the fine stage, in PyTorch.

    Attributes:
        name: what ``backend=`` calls it.
        purpose: where it runs and what for, in a line.
        composed: stages that consist of PyTorch's operators, which autograd, torch.compile and
            transforms follow by themselves; the others are called as operators ``torch.ops.vsa``.
        fuses_gates: whether coarse attention, the fine stage, combine and their gradients are one
            operator, ``gated_forward`` and so on.
    """

    composed: frozenset[str] = frozenset()
    fuses_gates = False

    def __init__(self, name: str, purpose: str) -> None:
        self.name = name
        self.purpose = purpose

    def why_not(self, request: Request) -> str | None:
        """What is missing here for a request, or None if it can run."""
        raise self._without("no answer to why it cannot run")

    def _without(self, what: str) -> NotImplementedError:
        """For operators that are called with a backend that does not compute them."""
        return NotImplementedError(
            f"backend {self.name!r} has {what}: call vsa.attention, which takes what a backend has"
        )

    def tile_means(self, xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """Mean of the tokens of every tile.

        Args:
            xs: (B, length, heads, head_dim) each, any strides; text tokens take no part.
            grids: the grid of each.

        Returns:
            (B, heads, num_tiles, head_dim) each, fp32 (fp64 for fp64 inputs), contiguous.
        """
        return [torch_coarse.tile_means(x, grid) for x, grid in zip(xs, grids, strict=True)]

    def spread_means(self, grads: Sequence[Tensor], grid: Grid, dtype: torch.dtype) -> list[Tensor]:
        """The gradients of ``tile_means`` in some of its tensors, which share a grid and a type.

        Args:
            grads: (B, heads, num_tiles, head_dim) each.
            grid: of these tensors.
            dtype: of these tensors.

        Returns:
            (B, length, heads, head_dim) each, zeros at text tokens.
        """
        return torch_coarse.spread_means(grads, grid, dtype)

    def padded_tile_means(self, xs: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
        """Mean of the real tokens of every padded tile, see ``torch_padded``."""
        return [torch_padded.tile_means(x, of) for x, of in zip(xs, sizes, strict=True)]

    def spread_padded_means(self, grad: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of ``padded_tile_means`` in one of its tensors."""
        return torch_padded.spread_means(grad, sizes, dtype)

    def select(
        self, scores: TileScores, v_means: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The choice of tiles, and with ``v_means`` the coarse attention from the same scores.

        Returns:
            bitmap: (B, heads, n_q, words) int32.
            coarse: (B, heads, n_q, head_dim), the type of the means, contiguous; None without
                ``v_means``.
        """
        return torch_coarse.select(scores, v_means)

    def select_by_sub_blocks(
        self, asked: SubBlockScores, v: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The choice of tiles by the means of their runs, see ``vsa.SubBlocks``.

        Args:
            asked: what is asked.
            v: (B, S_k, kv_heads, head_dim), for the coarse branch.

        Returns:
            bitmap: (B, heads, n_q, words) int32.
            means: of the tiles of q, k and v, as ``tile_means``; none without ``v``.
            coarse: the coarse attention of these, as ``select``; None without ``v``.
        """
        chosen = torch_sub_blocks.select(asked)
        if v is None:
            return chosen, [], None
        grid, kv_grid = asked.grids
        q_means, k_means, v_means = self.tile_means((asked.q, asked.k, v), (grid, kv_grid, kv_grid))
        coarse = self.coarse_attention(
            q_means, k_means, v_means, asked.scale, asked.mask, exact=True
        )
        return chosen, [q_means, k_means, v_means], coarse

    def coarse_attention(
        self,
        q_means: Tensor,
        k_means: Tensor,
        v_means: Tensor,
        scale: float,
        mask: TileMask | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Attention of tile means (B, heads, n, head_dim), see ``vsa.stages.coarse``.

        ``exact`` computes without TF32 and the like, whatever the process allows elsewhere.
        """
        if not exact:
            return torch_coarse.attention(q_means, k_means, v_means, scale, mask)
        with torch_coarse.full_precision(q_means.device):
            return torch_coarse.attention(q_means, k_means, v_means, scale, mask).contiguous()

    def combine(
        self,
        fine: Tensor,
        coarse: Tensor | None,
        gate_fine: Tensor | None,
        gate_coarse: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        """Gated sum of the two branches, see ``vsa.backends.torch_combine.combine``."""
        return combine(fine, coarse, gate_fine, gate_coarse, grid)

    def forward(self, problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
        """Exact attention over the selected tiles.

        Args:
            problem: what to compute.
            most: upper bound of the key tiles in a row of the bitmap.

        Returns:
            out: (B, S_q, heads, head_dim), the type of q; zeros where a token attends nothing.
            lse: (B, heads, S_q) fp32 (fp64 for fp64 inputs), natural logarithm; -inf where a token
                attends nothing.
        """
        raise self._without("no forward")

    def backward(
        self, upstream: Upstream, saved: Saved, problem: FineProblem, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``forward``: dq, dk and dv like q, k and v, contiguous."""
        raise self._without("no backward of its own")

    def low_precision(self, problem: Problem, precision: str, most: int) -> tuple[Tensor, Tensor]:
        """``forward`` in eight bits, "int8" or "fp8", without a backward."""
        raise self._without(f"no forward in {precision}")

    def gated_low_precision(
        self, problem: Problem, precision: str, gates: Gates
    ) -> tuple[Tensor, Tensor]:
        """Where gates are fused: ``gated_inference`` in eight bits."""
        raise self._without(f"no fused gates in {precision}")

    def tail_forward(self, problem: Problem, means: TailMeans, most: int) -> tuple[Tensor, Tensor]:
        """``forward``, and in the same softmax the tail: the means of tiles that were not chosen.

        Both results are those of the whole softmax.
        """
        out, lse = self.forward(problem, most)
        return self.add_tail(problem, means, out, lse)

    def add_tail(
        self, problem: Problem, means: TailMeans, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The results of ``forward`` become those of the whole softmax, in their place."""
        return torch_tail.add(problem, means, out, lse)

    def tail_backward(
        self, upstream: Upstream, saved: Saved, problem: Problem, means: TailMeans, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``tail_forward``: dq, dk and dv, what comes through the means included."""
        grads = self.backward(upstream, saved, problem, most)
        return self.add_tail_gradients(upstream, saved, problem, means, grads)

    def add_tail_gradients(
        self,
        upstream: Upstream,
        saved: Saved,
        problem: Problem,
        means: TailMeans,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """To gradients dq, dk and dv of the fine stage those that the tail brings, in their place.

        Those of the means become the tokens' own by ``spread_means``.
        """
        dq, dk, dv = grads
        of_means = torch_tail.add_gradients(upstream, saved, problem, means, dq)
        for grad, mean in zip((dk, dv), of_means, strict=True):
            grad += self.spread_means([mean], problem.grids[1], grad.dtype)[0]
        return dq, dk, dv

    def gated_forward(
        self, problem: FineProblem, gates: Gates, tail: TailMeans | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where gates are fused: out and lse, and the fine stage's output before its gate.

        With a tail, lse and the fine stage's output are those of the whole softmax.
        """
        raise self._without("no fused gates")

    def gated_inference(
        self, problem: FineProblem, gates: Gates, tail: TailMeans | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where gates are fused and no gradient is wanted: out and lse."""
        raise self._without("no fused gates")

    def gated_backward(
        self,
        upstream: Upstream,
        saved: Saved,
        problem: FineProblem,
        means: Means,
        gates: Gates,
        tail: TailMeans | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Where gates are fused: dq, dk, dv, and the gradients of both gates where they exist."""
        raise self._without("no fused gates")

    def whole_forward(self, call: WholeCall) -> tuple[Tensor, ...]:
        """Where gates are fused: all of ``torch.ops.vsa.attention``."""
        raise self._without("no operator for whole calls")

    def whole_inference(self, call: WholeCall) -> tuple[Tensor, Tensor, Tensor]:
        """Where gates are fused and no gradient is wanted: out, lse and the choice."""
        raise self._without("no operator for whole calls")

    def whole_backward(
        self, upstream: Upstream, saved: WholeSaved, call: WholeCall
    ) -> Sequence[Tensor | None]:
        """Where gates are fused: gradients of q, k, v and both gates."""
        raise self._without("no operator for whole calls")

    def prepare(self, task: Task) -> Prepared | None:
        """The whole call, ready to run on other tensors of the same kind; None where it is not."""
        return None


class Forward(NamedTuple):
    """What a prepared forward returns.

    Attributes:
        out: the operation's output, contiguous, the shape of q as it was given.
        fine: the fine stage's output before gates, like ``out``; ``out`` itself without gates, and
            where no gradient is wanted.
        kept: bytes of what a backward needs: lse and bitmap, where they are not tensors of their
            own.
        lse: (B, heads, S_q) fp32, where the task asks for it.
        bitmap: (B, heads, n_q, words) int32, the choice, where the task asks for it; None where it
            is given.
        coarse: (B, heads, n_q, head_dim) fp32, or None without a coarse gate or where no gradient
            is wanted.
        means: numbers of the tile means of q, k and v, fp32, or None where ``coarse`` is; with a
            tail and without a coarse gate those of q are not written.
    """

    out: Tensor
    fine: Tensor
    kept: Tensor
    lse: Tensor | None
    bitmap: Tensor | None
    coarse: Tensor | None
    means: Tensor | None


class Prepared(Protocol):
    """A task whose tensors come later. It holds no memory of a device.

    Tensors come in the order of the task: q, k, v, gate_fine, gate_coarse, text_valid and bitmap;
    then those of padded tiles, sizes, kv_sizes, lists or a map, and counts, or ``NO_PADDING``.

    Attributes:
        copied: which of them are copied before they are read; these may lie anywhere.
    """

    copied: frozenset[int]

    def forward(
        self, *tensors: Tensor | None, ready: Ready | None = None, held: Sequence[Tensor] = ()
    ) -> Forward:
        """Run it. Tensors are those of the task or their (B, T, H, W, heads, head_dim) views.

        Only q and k are read before ``ready`` is called, which makes the others so. ``held`` is the
        memory of a cache, where the task has one: tokens (2, B, S, kv_heads, head_dim), means (2,
        B, kv_heads, capacity, tiles, head_dim) fp32, and int64 numbers of its ring.
        """

    def backward(
        self, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of q, k, v and both gates, which ``tensors`` holds as ``forward`` got them.

        ``grad_out`` is contiguous, ``grad_lse`` contiguous fp32 or None.
        """

    def unpacked(self, found: Forward) -> tuple[Tensor, Tensor | None, Means]:
        """lse, bitmap and means as tensors, for the operators; no bitmap where it is given."""
