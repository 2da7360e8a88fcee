# SPDX-License-Identifier: Apache-2.0
"""Random problems, their reference results, and the rule for how close is close enough.

The tests and ``vsa check`` hold every backend to the same list by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa.functional import attention
from vsa.values.budget import TopP, resolve
from vsa.values.grid import Grid
from vsa.values.score import SubBlocks
from vsa.values.selection import Selection
from vsa.verify import dense, reference

KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's kernels, all of which are switched on by default."""


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call of ``vsa.attention`` on flat tensors."""

    name: str
    grid: tuple[int, int, int] = (5, 6, 7)
    tile: tuple[int, int, int] = (4, 4, 4)
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    topk: float | TopP | Sequence[float] = 3
    prefix: int = 0
    suffix: int = 0
    kv_grid: tuple[int, int, int] | None = None
    text_valid: bool = False
    gate_coarse: bool = False
    gate_fine: bool = False
    magnitude: float = 1.0
    scale: float | None = None
    tail: bool = False
    runs: int = 1
    dtype: torch.dtype = torch.float64

    @property
    def query_grid(self) -> Grid:
        """The queries' grid."""
        return Grid(self.grid, tile=self.tile, prefix=self.prefix, suffix=self.suffix)

    @property
    def key_grid(self) -> Grid:
        """The keys' grid."""
        return (
            self.query_grid
            if self.kv_grid is None
            else replace(self.query_grid, shape=self.kv_grid)
        )

    def without_extras(self) -> Problem:
        """The same shapes without text, gates and tail, which PyTorch's attention has not."""
        return replace(
            self,
            prefix=0,
            suffix=0,
            text_valid=False,
            gate_coarse=False,
            gate_fine=False,
            tail=False,
        )

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, the gates and an upstream gradient, all random."""
        generator = torch.Generator().manual_seed(seed)

        def normal(length: int, heads: int) -> Tensor:
            x = torch.randn(
                self.batch, length, heads, self.head_dim, generator=generator, dtype=torch.float64
            )
            return x.to(self.dtype)

        queries, keys = self.query_grid.length, self.key_grid.length
        tensors = {
            "q": normal(queries, self.heads) * self.magnitude,
            "k": normal(keys, self.kv_heads),
            "v": normal(keys, self.kv_heads),
        }
        if self.gate_coarse:
            tensors["gate_coarse"] = normal(queries, self.heads)
        if self.gate_fine:
            tensors["gate_fine"] = normal(queries, self.heads)
        return tensors | {
            "upstream": normal(queries, self.heads),
            "upstream_lse": normal(queries, self.heads)[..., 0],
        }

    def valid(self) -> Tensor | None:
        """(B, prefix + suffix): about half of the text is real, another half for each batch."""
        if not self.text_valid:
            return None
        return (
            torch.rand(
                self.batch, self.prefix + self.suffix, generator=torch.Generator().manual_seed(7)
            )
            < 0.5
        )


PROBLEMS = [
    Problem("ragged"),
    Problem("divisible", grid=(4, 8, 4), topk=1),
    Problem("dense", topk=1.0, gate_coarse=True),
    Problem("gates", gate_coarse=True, gate_fine=True, batch=2),
    Problem("grouped-query", heads=6, kv_heads=2, gate_coarse=True),
    Problem("multi-query", heads=3, kv_heads=1),
    Problem("share", grid=(3, 9, 10), topk=0.3, gate_fine=True),
    Problem("mass", grid=(3, 9, 10), topk=TopP(0.7, floor=2), gate_coarse=True),
    Problem("per-head", topk=(2, 0.6), batch=2),
    Problem("odd-tile", grid=(7, 10, 8), tile=(3, 5, 4), topk=4),
    Problem("flat-tile", grid=(2, 9, 9), tile=(1, 8, 8), topk=2, gate_coarse=True),
    Problem("tiny-tile", grid=(2, 3, 3), tile=(1, 1, 1), topk=5, gate_coarse=True),
    Problem("prime-tile", grid=(3, 4, 7), tile=(1, 2, 3), topk=4),
    Problem("corner-of-one", grid=(5, 5, 5), topk=2, gate_coarse=True, heads=1, kv_heads=1),
    Problem("prefix", grid=(4, 5, 6), prefix=5, topk=2, gate_coarse=True),
    Problem("suffix", grid=(4, 5, 6), suffix=70, topk=2),
    Problem(
        "text",
        grid=(4, 5, 6),
        prefix=3,
        suffix=6,
        topk=2,
        text_valid=True,
        batch=3,
        gate_coarse=True,
        gate_fine=True,
    ),
    Problem("other-keys", kv_grid=(9, 5, 6), topk=4, gate_coarse=True, heads=4, kv_heads=2),
    Problem("large-logits", magnitude=100.0, gate_coarse=True),
    Problem("scale", scale=0.7, head_dim=8),
    Problem("tail", tail=True, heads=4, kv_heads=2),
    Problem(
        "tail-gates-text",
        grid=(5, 5, 6),
        prefix=3,
        suffix=6,
        topk=2,
        text_valid=True,
        batch=3,
        gate_coarse=True,
        gate_fine=True,
        tail=True,
    ),
    Problem("tail-other-keys", kv_grid=(9, 5, 6), topk=(2, 0.6), batch=2, tail=True),
    Problem("tail-large-logits", magnitude=100.0, tail=True, gate_fine=True),
    Problem("sub-blocks", grid=(3, 9, 10), topk=4, runs=4, gate_coarse=True, batch=2),
    Problem(
        "sub-blocks-mass",
        kv_grid=(9, 5, 6),
        topk=TopP(0.7, floor=2),
        runs=3,
        heads=4,
        gate_fine=True,
    ),
    Problem("one-dimensional", grid=(1, 1, 200), tile=(1, 1, 64), topk=2, gate_coarse=True),
]


def by_name(name: str, **changes: Any) -> Problem:
    """A problem of the list, changed."""
    return replace(next(problem for problem in PROBLEMS if problem.name == name), **changes)


@dataclass(frozen=True)
class Result:
    """Output, log-sum-exp and gradients by name, on the CPU."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def ours(
    problem: Problem,
    tensors: dict[str, Tensor],
    device: torch.device | str = "cpu",
    gradients: bool = True,
    **options: Any,
) -> tuple[Result, Selection]:
    """``vsa.attention`` forward and backward on a device; the loss reaches out and lse."""
    leaves = _leaves(tensors, device, gradients)
    valid = problem.valid()
    out, selection, lse = attention(
        **leaves,
        topk=problem.topk,
        grid=problem.query_grid,
        kv_grid=None if problem.kv_grid is None else problem.key_grid,
        scale=problem.scale,
        score="mean" if problem.runs == 1 else SubBlocks(problem.runs),
        text_valid=None if valid is None else valid.to(device),
        tail=problem.tail,
        return_selection=True,
        return_lse=True,
        **options,
    )
    return _differentiated(out, lse, leaves, tensors), selection.to("cpu")


def expected(
    problem: Problem,
    tensors: dict[str, Tensor],
    mask: Tensor | None = None,
    oracle: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.attention,
) -> tuple[Result, Tensor]:
    """The same in fp64 by the reference, or by ``dense.attention``."""
    leaves = _leaves({name: x.double() for name, x in tensors.items()}, "cpu")
    topk, mass = (
        (problem.topk.floor, problem.topk.mass)
        if isinstance(problem.topk, TopP)
        else (problem.topk, 0.0)
    )
    out, chosen, lse = oracle(
        **leaves,
        topk=topk,
        mass=mass,
        grid=problem.grid,
        tile=problem.tile,
        prefix=problem.prefix,
        suffix=problem.suffix,
        kv_grid=problem.kv_grid,
        scale=problem.scale,
        runs=problem.runs,
        mask=mask,
        text_valid=problem.valid(),
        tail=problem.tail,
    )
    return _differentiated(out, lse, leaves, tensors), chosen


def sdpa(
    problem: Problem, tensors: dict[str, Tensor], mask: Tensor, device: torch.device | str = "cpu"
) -> Result:
    """PyTorch's own attention in the same type on the same keys: no text, no gates.

    By the kernel that it takes by default, whatever the process has switched off: a yardstick that
    another kernel makes is another yardstick (PyTorch 2.13 on a CPU: the error of dq in fp16 at
    large scores is six times smaller without the fused kernel).
    """
    tiles = (
        dense.membership(grid, problem.tile, 0, 0)
        for grid in (problem.grid, problem.kv_grid or problem.grid)
    )
    attended = dense.attended(mask, *tiles)
    leaves = _leaves({name: tensors[name] for name in "qkv"}, device)
    group = problem.heads // problem.kv_heads
    q, k, v = (x.transpose(1, 2) for x in leaves.values())
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    with sdpa_kernel(KERNELS):
        out = functional.scaled_dot_product_attention(
            q, k, v, attended.to(device), scale=problem.scale
        )
    return _differentiated(out.transpose(1, 2), out.new_zeros(()), leaves, tensors)


def _leaves(
    tensors: dict[str, Tensor], device: torch.device | str, gradients: bool = True
) -> dict[str, Any]:
    return {
        name: x.detach().to(device, copy=True).requires_grad_(gradients)
        for name, x in tensors.items()
        if not name.startswith("upstream")
    }


def _differentiated(
    out: Tensor, lse: Tensor, leaves: dict[str, Tensor], tensors: dict[str, Tensor]
) -> Result:
    if not out.requires_grad:
        return Result(out.cpu(), lse.cpu(), {})
    loss = (out.double() * tensors["upstream"].to(out.device).double()).sum()
    if lse.ndim:
        upstream = tensors["upstream_lse"].transpose(1, 2).to(lse)
        loss = loss + (lse.masked_fill(lse == float("-inf"), 0) * upstream).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Result(
        out.detach().cpu(),
        lse.detach().cpu(),
        {name: grad.cpu() for name, grad in zip(leaves, grads, strict=True)},
    )


def worst(x: Tensor, truth: Tensor) -> float:
    """Largest deviation, as a share of the largest magnitude of the truth."""
    return ((x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth| in the Euclidean norm: what rounding does on average."""
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def errors(result: Result, truth: Result) -> dict[str, float]:
    """``error`` of the output and of those gradients that the result has."""
    return {"out": error(result.out, truth.out)} | {
        name: error(grad, truth.grads[name]) for name, grad in result.grads.items()
    }


def relative_to_sdpa(
    problem: Problem,
    device: torch.device | str = "cpu",
    gradients: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Errors, text and gates included, as multiples of those of PyTorch's without them.

    At most 2 passes; NaN stays NaN, so compare each. PyTorch's error counts for no less than that
    of rounding the true result once: where softmax picks single tokens it is smaller, but gates
    make new numbers. Gradients of gates, which PyTorch's has not, are compared with its output.

    Returns:
        by name: selection, 0 where it is that of the definition (or, by the means of runs, differs
        from it only where rounding may decide) and infinite elsewhere; out, where no gradient is
        wanted; with ``gradients`` also the training forward's out, as "trained", and every
        gradient.
    """
    tensors, truth, chosen = _truth(problem)
    result, selection = ours(problem, tensors, device, gradients=False, **options)
    differs = not torch.equal(selection.mask(), chosen)
    if differs and problem.runs > 1 and _is_near(problem, tensors, selection.mask()):
        truth, chosen = expected(problem, tensors, selection.mask(), dense.attention)
    found = errors(result, truth)
    if gradients:
        result, again = ours(problem, tensors, device, gradients=True, **options)
        trained = errors(result, truth)
        found |= {"trained": trained.pop("out"), **trained}
        selection = selection if torch.equal(again.bitmap, selection.bitmap) else again
    plain = replace(problem.without_extras(), name="")
    yardstick = _error_of_sdpa(plain, torch.device(device))
    true = {"out": truth.out, "trained": truth.out, **truth.grads}
    right = torch.equal(selection.mask(), chosen)
    return {"selection": 0.0 if right else math.inf} | {
        name: off
        / max(
            yardstick.get(name, yardstick["out"]),
            error(true[name].to(problem.dtype), true[name]),
        )
        for name, off in found.items()
    }


def _is_near(problem: Problem, tensors: dict[str, Tensor], chosen: Tensor) -> bool:
    """Whether scores of runs, rounded as our kernels may, make this choice."""
    topk = problem.topk
    mass = topk.mass if isinstance(topk, TopP) else 0.0
    least = topk.floor if isinstance(topk, TopP) else topk
    grids = problem.query_grid, problem.key_grid
    counts = resolve(least, grids[1].num_tiles, problem.heads).counts
    q, k = (tensors[name].double().transpose(1, 2) for name in "qk")
    k = k.repeat_interleave(problem.heads // problem.kv_heads, dim=1)
    parts = [
        dense.tiles_in_runs(grid.shape, problem.tile, grid.prefix, grid.suffix, problem.runs)
        for grid in grids
    ]
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    scores = dense.sub_block_scores(q, k, parts, scale)
    bound = dense.sub_block_bound(q, k, parts, scale)
    count = torch.tensor(counts)[:, None]
    return bool(dense.within(chosen, scores, bound, count, mass).all())


@lru_cache(maxsize=128)
def _truth(problem: Problem) -> tuple[dict[str, Tensor], Result, Tensor]:
    """Inputs, true results and the true choice: the same for all who are compared with them."""
    tensors = problem.inputs()
    return tensors, *expected(problem, tensors, oracle=dense.attention)


@lru_cache(maxsize=128)
def _error_of_sdpa(plain: Problem, device: torch.device) -> dict[str, float]:
    """What PyTorch's own attention makes of a problem without text and gates."""
    tensors = plain.inputs()
    tensors["upstream_lse"].zero_()
    truth, chosen = expected(plain, tensors, oracle=dense.attention)
    return errors(sdpa(plain, tensors, chosen, device), truth)
