# SPDX-License-Identifier: Apache-2.0
"""Parity of the fine stage with fp64 on the token grid of a model's layer, on sampled tiles.

Query tiles (the last, one clipped along each axis, the first, random ones) and all valid text in
runs of 64 are compared one by one, each over the tokens of its key tiles and the valid text. What
counts is the worst error as a multiple of a yardstick's; at most 2 passes. No yardstick counts for
less than rounding the true result once.

out     PyTorch's SDPA (flash attention where it runs) in the same type on the same tokens
dq      autograd through that SDPA with the same upstream gradient
dk, dv  of three key tiles and all text, over all queries that attend them: the same sums in fp32,
        where only P and dS before their products, and the out that delta = sum(dO out) is made of,
        are rounded to the type, as in flash attention
lse     |difference| / (1e-5 + 1e-5 |lse|), of which at most 1 passes

Besides, text that is padding must come out as exact zeros (lse: -inf), and a second forward call
must give the same bits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vsa.functional import block_sparse_attention, select
from vsa.values.grid import Grid
from vsa.verify.fp64_sample import Exact
from vsa.verify.parity import error

LIMITS = {"out": 2.0, "lse": 1.0, "dq": 2.0, "dk": 2.0, "dv": 2.0}
"""Multiples that pass, by what is compared."""
KEY_TILES = 3
VALID_TEXT = 0.6
"""Share of the text that is real, where some of it is padding."""


@dataclass(frozen=True)
class Layer:
    """A layer to check on random inputs.

    Attributes:
        grid: its tokens.
        heads: query heads.
        kv_heads: key and value heads, of which ``heads`` is a multiple.
        head_dim: channels of a head.
        dtype: of the inputs.
        topk: key tiles per query tile, a share or a number.
        padded_text: whether the end of the text is padding.
    """

    grid: Grid
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    topk: float = 0.125
    padded_text: bool = False

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v and the upstream gradient, (1, S, heads, head_dim) each, always the same."""
        make: dict[str, Any] = {
            "generator": torch.Generator(device).manual_seed(0),
            "device": device,
        }
        sizes = ((self.heads, 2), (self.kv_heads, 1), (self.kv_heads, 1), (self.heads, 1))
        return tuple(
            (magnitude * torch.randn(1, self.grid.length, heads, self.head_dim, **make)).to(
                self.dtype
            )
            for heads, magnitude in sizes
        )

    def text_valid(self, device: torch.device) -> Tensor | None:
        """(1, text) bool, or None where all of the text is real."""
        if not self.padded_text:
            return None
        place = torch.arange(self.grid.text, device=device)[None]
        return place < VALID_TEXT * self.grid.text


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        multiples: the worst error of each result as a multiple of its yardstick's.
        failed: what does not pass, in words; empty if all does.
    """

    multiples: dict[str, float]
    failed: list[str] = field(default_factory=list)


def small(grid: Grid) -> Grid:
    """About a quarter of a grid along each axis, with the same remainders by 4."""
    sizes = (*grid.shape, grid.prefix, grid.suffix)
    t, h, w, *text = (n and 4 * max(1, n // 16) + n % 4 for n in sizes)
    return Grid((t, h, w), grid.tile, *text)


def sampled(grid: Grid, count: int) -> list[int]:
    """``count`` tiles: the last, a random one, one clipped along each axis, the first, others."""
    n = grid.num_tiles
    others = random.Random(0).sample(range(n), n)
    ragged = [axis for axis in range(3) if grid.shape[axis] % grid.box[axis]]
    index = torch.arange(n).view(grid.tiles)
    clipped = (random.Random(1).choice(index.select(x, -1).flatten().tolist()) for x in ragged)
    return list(dict.fromkeys([n - 1, others[0], *clipped, 0, *others]))[:count]


def check(layer: Layer, device: torch.device, backend: str, tiles: int, gradients: bool) -> Verdict:
    """Hold the fine stage of a backend to fp64.

    Args:
        layer: what to run.
        device: where.
        backend: which.
        tiles: query tiles that are compared.
        gradients: whether dq, dk and dv are too.
    """
    grid = layer.grid
    q, k, v, upstream = layer.inputs(device)
    valid = layer.text_valid(device)
    selection = select(q, k, layer.topk, grid=grid)
    leaves = tuple(x.clone().requires_grad_(gradients) for x in (q, k, v))

    def call() -> tuple[Tensor, Tensor]:
        queries, keys, values = leaves
        return block_sparse_attention(
            queries, keys, values, selection, text_valid=valid, return_lse=True, backend=backend
        )

    out, lse = call()
    again = call()
    found = {"lse": lse[0].detach(), "out": out[0].detach().transpose(0, 1)}
    if gradients:
        grads = torch.autograd.grad(out, leaves, upstream)
        found |= {f"d{x}": d[0].transpose(0, 1) for x, d in zip("qkv", grads, strict=True)}
    exact = Exact(grid, selection.mask()[0], valid, q, k, v, upstream)
    groups = sampled(grid, tiles) + [grid.num_tiles] * bool(grid.text)
    multiples = compare(exact, found, groups)
    passed = {x: multiples[x] <= LIMITS[x] for x in multiples}
    passed["same bits"] = torch.equal(out, again[0]) and torch.equal(lse, again[1])
    idle, nothing = exact.members(grid.num_tiles + 1), {"lse": -torch.inf}
    for x, result in found.items():
        passed[f"padding of {x}"] = bool((result[:, idle] == nothing.get(x, 0)).all())
    return Verdict(multiples, [x for x in passed if not passed[x]])


def compare(exact: Exact, found: dict[str, Tensor], groups: list[int]) -> dict[str, float]:
    """The worst multiple of every result.

    Args:
        exact: what should have come out.
        found: by name, (heads, S, head_dim), or lse (heads, S).
        groups: tiles and, last, the text, as ``Exact`` numbers them.
    """
    multiples: dict[str, list[float]] = {name: [] for name in LIMITS if name in found}

    def note(names: str, at: tuple[int, Tensor], *results: tuple[Tensor, Tensor]) -> None:
        for name, truth, yardstick in zip(names.split(), *results, strict=True):
            if name in found:
                x = found[name][at]
                allowed = max(error(yardstick, truth), error(truth.to(x.dtype), truth), 1e-30)
                multiples[name].append(error(x, truth) / allowed)

    for head, group in product(range(len(exact.q)), groups):
        for at in ((head, run) for run in exact.members(group).split(64)):
            note("out dq", at, exact.forward(*at), exact.sdpa(*at))
            off = (found["lse"][at] - exact.lse[at]).abs() / (1e-5 + 1e-5 * exact.lse[at].abs())
            multiples["lse"].append(off.max().item())
    chosen = dict.fromkeys(groups[:KEY_TILES] + groups[-1:]) if "dk" in found else ()
    for at in ((head, exact.members(j)) for head in range(len(exact.k)) for j in chosen):
        note("dk dv", at, *(exact.key_gradients(*at, rounded) for rounded in (False, True)))
    return {name: torch.tensor(x).max().item() for name, x in multiples.items()}  # NaN stays NaN
