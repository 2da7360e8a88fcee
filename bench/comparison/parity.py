# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel computes attention at all, on sampled tiles against fp64, before it is timed."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from comparison.problem import Problem
from exact import Exact
from vsa.parity import error

QUERY_TILES, KEY_TILES = 4, 2
LIMITS = {"out": 0.01, "lse": 0.01, "dq": 0.02, "dk": 0.02, "dv": 0.02}
"""Of the relative error in the Euclidean norm over the sample; of the largest error for lse."""


class Sample:
    """Some tiles of the first set of inputs, each of one head, and their attention in fp64."""

    def __init__(self, problem: Problem, dense: bool):
        mask = problem.selection.mask()[0]
        chosen = torch.ones_like(mask) if dense else mask
        self.exact = Exact(problem.grid, chosen, None, *problem.sets[0])
        draw, last = random.Random(0), problem.grid.num_tiles - 1

        def tiles(heads: list[int]) -> list[tuple[int, Tensor]]:
            numbers = [last, *(draw.randint(0, last) for _ in heads[1:])]
            return [(h, self.exact.members(n)) for h, n in zip(heads, numbers, strict=True)]

        self.queries = tiles([draw.randrange(problem.case.heads) for _ in range(QUERY_TILES)])
        # Of one head: a dense key tile needs all queries of its head, which are then kept.
        self.keys = tiles([draw.randrange(problem.case.heads)] * KEY_TILES)

    def forward_errors(self, out: Tensor, lse: Tensor | None) -> dict[str, float]:
        """Of out (1, S, heads, head_dim) and lse (1, heads, S), where the kernel returns one."""
        truths = [self.exact.forward(*at)[0] for at in self.queries]
        found = [out[0, tokens, head] for head, tokens in self.queries]
        errors = {"out": error(torch.cat(found), torch.cat(truths))}
        if lse is not None:
            off = (lse[0][at] - self.exact.lse[at] for at in self.queries)
            errors["lse"] = torch.cat(list(off)).abs().max().item()
        return errors

    def backward_errors(self, dq: Tensor, dk: Tensor, dv: Tensor) -> dict[str, float]:
        """Of gradients (1, S, heads, head_dim)."""
        truths = {"dq": torch.cat([self.exact.forward(*at)[1] for at in self.queries])}
        pairs = [self.exact.key_gradients(*at, rounded=False) for at in self.keys]
        truths |= dict(zip(("dk", "dv"), map(torch.cat, zip(*pairs, strict=True)), strict=True))
        errors = {}
        for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
            sample = self.queries if name == "dq" else self.keys
            found = torch.cat([grad[0, tokens, head] for head, tokens in sample])
            errors[name] = error(found, truths[name])
        return errors


def verdict(errors: dict[str, float]) -> str | None:
    """What is wrong, if anything is."""
    wrong = [
        f"{x} by {e:.2g} (at most {LIMITS[x]})" for x, e in errors.items() if not e <= LIMITS[x]
    ]
    return f"wrong results, so not timed: {', '.join(wrong)}" if wrong else None
