# SPDX-License-Identifier: Apache-2.0
"""One line of ``vsa bench``: sparse and dense attention on the same inputs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

import vsa
from vsa.cli.bench.measurement import Measurement, Native
from vsa.measure import stage_hooks
from vsa.measure.gpu_monitor import Monitor
from vsa.measure.nvtx_ranges import record
from vsa.measure.shapes import Shape
from vsa.measure.timing import peak_memory, seconds, sets_beyond_cache, settled, spread
from vsa.measure.ways import QUEUED, host_seconds, in_a_graph
from vsa.values import checks
from vsa.values.precision import Precision
from vsa.values.score import Score
from vsa.verify.sampled import Sample

Inputs = tuple[Tensor, ...]  # q, k and v, (1, S, heads, head_dim)


KERNELS = {
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    SDPBackend.FLASH_ATTENTION.value: "PyTorch's FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION.value: "PyTorch's memory-efficient kernel",
    SDPBackend.MATH.value: "PyTorch's products and softmax",
}


class WrongResults(Exception):
    """``vsa.attention`` is not what it should be here, so its time means nothing."""


@dataclass(frozen=True)
class Case:
    """A layer on random inputs, and how it is run and timed.

    Attributes:
        name: of the layer.
        layer: its grid and heads.
        topk: key tiles per query tile.
        pattern: what it is called; "chosen" by attention itself, or "random" and so on.
        selection: that pattern; None where attention chooses.
        backend: of the sparse runs.
        repeats: of every timing.
        score: what attention chooses by.
        sets: inputs that calls go round, so that none finds its own in the L2 cache.
        with_stages: whether the stages of the sparse runs are timed too, in calls of their own.
        with_ways: whether they are timed in a CUDA graph and compiled too.
        tail: whether tiles that are not chosen enter the softmax by their means.
        precision: of the sparse runs; where it is not native, native ones are timed beside them.
    """

    name: str
    layer: Shape
    topk: float
    pattern: str
    selection: vsa.Selection | None
    backend: str
    repeats: int
    score: Score
    sets: Sequence[Inputs]
    with_stages: bool
    with_ways: bool = False
    tail: bool = False
    precision: Precision = "native"

    def measure(self, direction: str, monitor: Monitor) -> Measurement:
        """Parity first, then both times.

        Raises:
            WrongResults: if sampled tiles are not what they should be.
        """
        backward = direction != "forward"
        sets = [tuple(x.detach().requires_grad_(backward) for x in each) for each in self.sets]
        upstream = torch.randn_like(sets[0][0])
        errors = self._errors(sets[0], upstream, backward)
        other = None if self.precision == "native" else replace(self, precision="native")
        other_errors = {} if other is None else other._errors(sets[0], upstream, backward)

        def timed(run: Callable[[], object]) -> tuple[list[float], dict[str, float]]:
            calls = settled(run, upstream.device)
            begin = time.monotonic()
            times = seconds(run, upstream.device, self.repeats, calls)
            return times, monitor.during(begin, time.monotonic())

        run_dense = _around(_dense, sets, upstream, backward)
        dense, dense_gpu = timed(run_dense)
        native = None
        if other is not None:
            times, gpu = timed(_around(other._sparse, sets, upstream, backward))
            native = Native(statistics.median(times), spread(times), gpu, other_errors)
        run = _around(self._sparse, sets, upstream, backward)
        sparse, sparse_gpu = timed(run)
        _, memory = peak_memory(run, upstream.device)
        host: dict[str, float] = {}
        if upstream.device.type == "cuda":
            for name, each in (("dense", run_dense), ("sparse", run)):
                host[name] = host_seconds(each, self.repeats)
        ways: dict[str, float] = {}
        if self.with_ways:
            compiled = _around(self._compiled(), sets, upstream, backward)
            graph = in_a_graph(run, calls := QUEUED * len(sets))
            for name, each, count in (("compiled", compiled, 1), ("graph", graph, calls)):
                ways[name] = statistics.median(timed(each)[0]) / count
            host["compiled"] = host_seconds(compiled, self.repeats)
        grid = self.layer.grid
        layer = self.layer
        cost = vsa.flops(
            grid,
            layer.heads,
            layer.head_dim,
            self.topk,
            backward=backward,
            score=self.score,
            tail=self.tail,
        )
        dense_time, sparse_time = statistics.median(dense), statistics.median(sparse)
        return Measurement(
            shape=self.name,
            pattern=self.pattern,
            grid=grid.shape,
            text=grid.text,
            heads=self.layer.heads,
            head_dim=self.layer.head_dim,
            direction=direction,
            kept=checks.top_k(self.topk, grid.num_tiles),
            tiles=grid.num_tiles,
            dense=dense_time,
            sparse=sparse_time,
            dense_spread=spread(dense),
            sparse_spread=spread(sparse),
            dense_tflops=cost.full / dense_time / 1e12,
            sparse_tflops=cost.fine / sparse_time / 1e12,
            memory=memory,
            inputs=sum(x.nbytes for x in sets[0]),
            errors=errors,
            dense_gpu=dense_gpu,
            sparse_gpu=sparse_gpu,
            stages=self._stages(sets, upstream, backward) if self.with_stages else {},
            host=host,
            ways=ways,
            tail=self.tail,
            precision=self.precision,
            native=native,
        )

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, **returns: bool) -> Any:
        return vsa.attention(
            q,
            k,
            v,
            self.topk if self.selection is None else None,
            grid=self.layer.grid,
            selection=self.selection,
            score=self.score,
            tail=self.tail,
            precision=self.precision,
            backend=self.backend,
            **cast("Any", returns),
        )

    def _compiled(self) -> Callable[..., Tensor]:
        """``_sparse`` in one graph of torch.compile."""
        torch.compiler.reset()  # not a graph for sizes that vary, after the layer before

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._sparse(q, k, v)

        return torch.compile(attend, fullgraph=True)

    def _stages(self, sets: Sequence[Inputs], upstream: Tensor, backward: bool) -> dict[str, float]:
        around = itertools.cycle(sets)

        def run(open_range: stage_hooks.Range) -> None:
            inputs = next(around)
            with open_range("forward"):
                out = self._sparse(*inputs)
            if backward:
                with open_range("backward"):
                    torch.autograd.grad(out, inputs, upstream)

        return record(run, upstream.device, self.repeats)

    def _errors(self, inputs: Inputs, upstream: Tensor, backward: bool) -> dict[str, float]:
        out, chosen, lse = self._sparse(*inputs, return_selection=True, return_lse=True)
        fixed = (x.detach() for x in inputs)
        exact = Sample(
            self.layer.grid,
            chosen.mask()[0],
            *fixed,
            upstream,
            tail=self.tail,
            precision=self.precision,
        )
        errors = exact.forward_errors(out.detach(), lse.detach())
        if backward:
            errors |= exact.backward_errors(*torch.autograd.grad(out, inputs, upstream))
        if wrong := exact.verdict(errors):
            what = (
                self.backend if self.precision == "native" else f"{self.backend} {self.precision}"
            )
            raise WrongResults(f"{self.name}, topk {self.topk:g}, {what}: {wrong}")
        return errors


def inputs_of(layer: Shape, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Sets of random inputs, as many as calls should go round."""
    size = 3, 1, layer.grid.length, layer.heads, layer.head_dim
    first = torch.randn(size, device=device, dtype=dtype)
    more = range(sets_beyond_cache(first.nbytes, device) - 1)
    return [tuple(x) for x in (first, *(torch.randn_like(first) for _ in more))]


def dense_kernel(inputs: Inputs, backward: bool) -> str:
    """Which kernel PyTorch's scaled_dot_product_attention takes for these inputs."""
    q, k, v = (x.detach().transpose(1, 2).requires_grad_(backward) for x in inputs)
    return KERNELS.get(torch._fused_sdp_choice(q, k, v), "PyTorch's scaled_dot_product_attention")


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _around(
    attend: Callable[..., Tensor], sets: Sequence[Inputs], upstream: Tensor, backward: bool
) -> Callable[[], object]:
    """A call that takes the next set of inputs every time."""
    around = itertools.cycle(sets)
    if not backward:
        return lambda: attend(*next(around))

    def with_gradients() -> object:
        inputs = next(around)
        return torch.autograd.grad(attend(*inputs), inputs, upstream)

    return with_gradients
