# SPDX-License-Identifier: Apache-2.0
"""The project's own kernels: on a Hopper GPU, or the same source emulated on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vsa.backends.base import Backend, Prepared, Request
from vsa.backends.kernels import (
    backward,
    coarse_select,
    forward,
    low_precision,
    sub_blocks,
    tail_forward,
    whole,
)
from vsa.backends.kernels.machine import Emulator, Gpu, Machine
from vsa.backends.kernels.prepared import PreparedAttention, can_prepare
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


class KernelBackend(Backend):
    """All stages by kernels, coarse attention and gates fused with the fine stage.

    Attributes:
        machine: what runs the kernels.
    """

    fuses_gates = True

    def __init__(self, name: str, purpose: str, machine: Machine) -> None:
        super().__init__(name, purpose)
        self.machine = machine

    def tile_means(self, xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """See ``Backend.tile_means``; up to three tensors in one launch."""
        if coarse_select.can_mean(xs):
            return coarse_select.tile_means(self.machine, xs, grids)
        return super().tile_means(xs, grids)

    def padded_tile_means(self, xs: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
        """See ``Backend.padded_tile_means``; up to three tensors in one launch."""
        if coarse_select.can_mean(xs):
            return coarse_select.padded_tile_means(self.machine, xs, sizes)
        return super().padded_tile_means(xs, sizes)

    def select(
        self, scores: TileScores, v_means: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Backend.select``."""
        if coarse_select.can_select(scores):
            return coarse_select.select(self.machine, scores, v_means)
        return super().select(scores, v_means)

    def coarse_attention(
        self,
        q_means: Tensor,
        k_means: Tensor,
        v_means: Tensor,
        scale: float,
        mask: TileMask | None = None,
        exact: bool = False,
    ) -> Tensor:
        """See ``Backend.coarse_attention``; as an operator by the kernels."""
        if exact and q_means.dtype == torch.float32:
            return coarse_select.attend(self.machine, q_means, k_means, v_means, scale, mask)
        return super().coarse_attention(q_means, k_means, v_means, scale, mask, exact)

    def select_by_sub_blocks(
        self, asked: SubBlockScores, v: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """See ``Backend.select_by_sub_blocks``; means of runs and tiles come in one pass."""
        if sub_blocks.can_score(asked):
            return sub_blocks.select(self.machine, asked, v)
        return super().select_by_sub_blocks(asked, v)

    def forward(self, problem: FineProblem, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.forward``."""
        return forward.forward(self.machine, problem, Gates())

    def backward(
        self, upstream: Upstream, saved: Saved, problem: FineProblem, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.backward``."""
        means = Means(None, None, None)
        return backward.backward(self.machine, upstream, saved, problem, means, Gates())[:3]

    def low_precision(self, problem: Problem, precision: str, most: int) -> tuple[Tensor, Tensor]:
        """See ``Backend.low_precision``."""
        return low_precision.forward(self.machine, problem, precision)

    def gated_low_precision(
        self, problem: Problem, precision: str, gates: Gates
    ) -> tuple[Tensor, Tensor]:
        """See ``Backend.gated_low_precision``: combine is the end of the kernel."""
        return low_precision.forward(self.machine, problem, precision, gates)

    def add_tail(
        self, problem: Problem, means: TailMeans, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Backend.add_tail``."""
        tail_forward.add(self.machine, problem, means, Gates(), out, lse)
        return out, lse

    def tail_backward(
        self, upstream: Upstream, saved: Saved, problem: Problem, means: TailMeans, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.tail_backward``: the tail's passes lie between those of the fine stage."""
        none = Means(None, None, None)
        return self.gated_backward(upstream, saved, problem, none, Gates(), means)[:3]

    def gated_forward(
        self, problem: FineProblem, gates: Gates, tail: TailMeans | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.gated_forward``."""
        if tail is not None:
            assert isinstance(problem, Problem)  # padded tiles have no operator with a tail
            out, lse = forward.forward(self.machine, problem, Gates())
            fine = torch.empty_like(out)
            tail_forward.add(self.machine, problem, tail, gates, out, lse, fine)
            return out, lse, fine
        if gates.gate_fine is None and gates.gate_coarse is None:
            out, lse = forward.forward(self.machine, problem, gates)
            return out, lse, out.clone()
        fine = forward.contiguous_like(problem.q)
        out, lse = forward.forward(self.machine, problem, gates, fine)
        return out, lse, fine

    def gated_inference(
        self, problem: FineProblem, gates: Gates, tail: TailMeans | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Backend.gated_inference``: combine is the end of the last kernel."""
        if tail is not None:
            assert isinstance(problem, Problem)  # padded tiles have no operator with a tail
            out, lse = forward.forward(self.machine, problem, Gates())
            tail_forward.add(self.machine, problem, tail, gates, out, lse)
            return out, lse
        return forward.forward(self.machine, problem, gates)

    def gated_backward(
        self,
        upstream: Upstream,
        saved: Saved,
        problem: FineProblem,
        means: Means,
        gates: Gates,
        tail: TailMeans | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """See ``Backend.gated_backward``."""
        return backward.backward(self.machine, upstream, saved, problem, means, gates, tail)

    def whole_forward(self, call: WholeCall) -> tuple[Tensor, ...]:
        """See ``Backend.whole_forward``."""
        return whole.forward(self, call)

    def whole_inference(self, call: WholeCall) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backend.whole_inference``."""
        return whole.inference(self, call)

    def whole_backward(
        self, upstream: Upstream, saved: WholeSaved, call: WholeCall
    ) -> Sequence[Tensor | None]:
        """See ``Backend.whole_backward``."""
        return whole.backward(self, upstream, saved, call)

    def prepare(self, task: Task) -> Prepared | None:
        """See ``Backend.prepare``."""
        return PreparedAttention(self.machine, task) if can_prepare(task) else None


class HopperBackend(KernelBackend):
    """The kernels on a GPU of compute capability 9.0."""

    def __init__(self, name: str, purpose: str) -> None:
        super().__init__(name, purpose, Gpu())

    def why_not(self, request: Request) -> str | None:
        """A device, build, type or head_dim that the kernels do not support."""
        if request.device != "cuda" or not _is_hopper(request.index):
            return "it needs a CUDA device of compute capability 9.0 (H100, H200)"
        return _unsupported(request, cuda=True)


class EmulatedBackend(KernelBackend):
    """The kernels' source on a CPU."""

    def __init__(self, name: str, purpose: str) -> None:
        super().__init__(name, purpose, Emulator())

    def why_not(self, request: Request) -> str | None:
        """A device, build, type or head_dim that the kernels do not support."""
        if request.device != "cpu":
            return "it emulates the kernels on a CPU, for CPU tensors"
        return _unsupported(request, cuda=False)


def _is_hopper(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


@cache
def _built(cuda: bool) -> str | None:
    """Why the compiled part cannot run kernels on this kind of machine, None if it can."""
    try:
        from vsa import _C
    except ImportError:
        return "the compiled part of vsa is missing, see vsa info"
    if cuda and not _C.build_info()["cuda"]:
        return "vsa was built without its CUDA kernels, see vsa info"
    return None


def _unsupported(request: Request, cuda: bool) -> str | None:
    """What the kernels of both machines need."""
    if (missing := _built(cuda)) is not None:
        return missing
    from vsa import _C

    dtype = request.dtype and request.dtype.removeprefix("torch.")
    if dtype not in (None, *_C.ELEMENTS):
        return f"the kernels take {' and '.join(_C.ELEMENTS)}, not {dtype}"
    if request.head_dim not in (None, *_C.HEAD_DIMS):
        allowed = " or ".join(map(str, _C.HEAD_DIMS))
        return f"the kernels take a head_dim of {allowed}, not {request.head_dim}"
    return None
