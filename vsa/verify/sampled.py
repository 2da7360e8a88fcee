# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel computes attention at all, on sampled tiles against fp64, before it is timed."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from vsa.values.grid import Grid
from vsa.verify.fp64_sample import Exact
from vsa.verify.parity import error

QUERY_TILES, KEY_TILES = 4, 2
LIMITS = {"out": 0.01, "lse": 0.01, "dq": 0.02, "dk": 0.02, "dv": 0.02}
"""Of the relative error in the Euclidean norm over the sample, of the largest error for lse; in 16
bits. A hundredth of that in fp32."""

LOW_LIMITS = {"int8": {"out": 0.048, "lse": 0.05}, "fp8": {"out": 0.065, "lse": 0.1}}
"""The same of low precision, on inputs of N(0,1). Log-sum-exps are off by most where a row attends
few keys: up to 0.035 in int8, 0.072 in fp8 (``vsa.verify.low_precision``)."""


class Sample:
    """Some tiles of the video, each of one head, and their attention in fp64.

    Args:
        grid: of the sequence.
        chosen: (heads, num_tiles, num_tiles), which query tile attends which key tile.
        inputs: q, k, v and the gradient of the output, (1, S, heads, head_dim) each.
        tail: whether tiles that are not chosen enter the softmax by their means.
        precision: what results are to be held to.
    """

    def __init__(
        self,
        grid: Grid,
        chosen: Tensor,
        *inputs: Tensor,
        tail: bool = False,
        precision: str = "native",
    ):
        self.exact = Exact(grid, chosen, None, *inputs, tail=tail)
        share = 0.01 if inputs[0].dtype in (torch.float32, torch.float64) else 1.0
        self.limits = {name: share * limit for name, limit in LIMITS.items()}
        self.limits |= LOW_LIMITS.get(precision, {})
        draw, last, heads = random.Random(0), grid.num_tiles - 1, inputs[0].shape[2]

        def tiles(of: list[int]) -> list[tuple[int, Tensor]]:
            numbers = [last, *(draw.randint(0, last) for _ in of[1:])]
            return [(h, self.exact.members(n)) for h, n in zip(of, numbers, strict=True)]

        self.queries = tiles([draw.randrange(heads) for _ in range(QUERY_TILES)])
        # Of one head: a dense key tile needs all queries of its head, which are then kept.
        self.keys = tiles([draw.randrange(heads)] * KEY_TILES)

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

    def verdict(self, errors: dict[str, float]) -> str | None:
        """What is wrong, if anything is."""
        wrong = [
            f"{x} by {e:.2g} (at most {self.limits[x]:g})"
            for x, e in errors.items()
            if not e <= self.limits[x]
        ]
        return f"wrong results, so not timed: {', '.join(wrong)}" if wrong else None
