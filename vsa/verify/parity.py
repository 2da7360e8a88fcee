# SPDX-License-Identifier: Apache-2.0
"""Reference results of random problems, and the rule for how close is close enough.

The tests and ``vsa check`` hold every backend to the same list by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa.functional import attention
from vsa.values.budget import TopP, resolve
from vsa.values.score import SubBlocks
from vsa.values.selection import Selection
from vsa.verify import dense, reference
from vsa.verify.problems import PROBLEMS, Problem, by_name

__all__ = ["PROBLEMS", "Problem", "Result", "by_name", "errors", "expected", "ours", "sdpa"]

KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's kernels, all of which are switched on by default."""


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
        mask=problem.mask,
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
        allowed=problem.allowed(),
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
