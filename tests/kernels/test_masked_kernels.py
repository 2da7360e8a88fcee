# SPDX-License-Identifier: Apache-2.0
"""Kernels under a mask over tiles: what they choose and compute, and what they leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import machine_of, on_both
from kernels.test_coarse_select import SCORES
from torch import Tensor

import vsa
from vsa.backends import torch_coarse, torch_kept_tiles
from vsa.backends.kernels import coarse_backward, coarse_calls, coarse_select, masked_calls
from vsa.backends.kernels.calls import means_call
from vsa.backends.kernels.coarse_calls import select_call
from vsa.masks import ChunkCausal, TeacherForcing, Window
from vsa.values import bitmap, masks
from vsa.values.grid import Grid
from vsa.values.tile_mask import TileMask, spend

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

GRIDS = {
    "causal": (ChunkCausal(2), (12, 16, 8), (12, 16, 8)),
    "window of chunks": (ChunkCausal(2, window=2, sinks=1), (4, 16, 8), (14, 16, 8)),
    "forcing": (TeacherForcing(4), (24, 16, 8), (24, 16, 8)),
    "near": (Window((1, 2, 1)), (8, 16, 8), (20, 16, 8)),
}
"""Rules on tiles of (2, 2, 2) tokens: 32 to a layer, so that blocks of 64 tiles are two layers."""


def on_tiles(name: str) -> tuple[TileMask, Grid, Grid]:
    rule, *shapes = GRIDS[name]
    grid, kv_grid = (Grid(shape, tile=(2, 2, 2)) for shape in shapes)
    found = masks.resolve(rule, grid, kv_grid, 1)
    assert found is not None
    return found, grid, kv_grid


def as_tensor(mask: TileMask, grid: Grid, heads: int = 1) -> TileMask:
    """Bitmaps instead of a rule; of several heads with other rows, some of them empty."""
    allowed = mask.matrix(grid.num_tiles, None).repeat(heads, 1, 1)
    if heads > 1:
        allowed &= torch.rand(allowed.shape) < 0.7
        allowed[:, 3:4] = False
    return TileMask((), allowed)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Any, ...]:
    """Scores, a mask, forced tiles, budgets, and where the rows stand among all."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layers, past = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    plane = draw(st.sampled_from([(1, 1), (2, 3), (5, 7), (9, 9), (12, 13)]))
    number = st.integers(0, 3)
    rule = draw(
        st.builds(ChunkCausal, st.integers(1, 3), st.none() | st.integers(1, 3), number)
        | st.builds(lambda *reach: Window(reach), number, number, number)
    )
    grids = [Grid((t, *plane), tile=(1, 1, 1)) for t in (layers, layers + past)]
    mask = masks.resolve(rule, *grids, heads)
    assert mask is not None
    if draw(st.booleans()):
        mask = as_tensor(mask, grids[0], draw(st.sampled_from([1, heads])))
    tiles, columns = (grid.num_tiles for grid in grids)
    first = draw(st.sampled_from([0, tiles * heads * batch // 2]))
    rows = tiles * heads * batch - first
    scores = SCORES[draw(st.sampled_from(sorted(SCORES)))](rows, columns)
    density = draw(st.sampled_from([None, 0.0, 0.1, 1.0]))
    must = None if density is None else torch.rand(tiles, columns) < density
    many = draw(st.sampled_from([1, heads]))
    shares = [draw(st.just(0.0) | st.floats(0.01, 1.0)) for _ in range(many)]
    counts = [
        math.ceil(share * columns) if share else draw(st.integers(1, columns)) for share in shares
    ]
    mass = draw(st.just(0.0) | st.floats(0.01, 1.0))
    return scores, mask, must, counts, shares, mass, tiles, heads, first


@on_both
@given(case=choices())
@settings(max_examples=60, deadline=None)
def test_kernel_and_pytorch_choose_the_same_tiles(case: Any, machine: str) -> None:
    scores, mask, must, counts, shares, mass, tiles, heads, first = case
    rows, columns = scores.shape
    row = torch.arange(first, first + rows)
    allowed = mask.rows(row // tiles % heads, row % tiles)
    budget = row // tiles % len(counts)
    least = spend(
        allowed.sum(-1, keepdim=True),
        torch.tensor(counts)[budget][:, None],
        torch.tensor(shares, dtype=torch.float64)[budget][:, None],
    )
    forced = None if must is None else must[row % tiles] & allowed
    expected = torch_kept_tiles.kept_tiles(scores, forced, least, max(counts), mass, allowed)
    words = torch.full((rows, bitmap.num_words(columns)), -1, dtype=torch.int32, device=machine)
    there = scores.to(machine).contiguous()
    weights = torch.full_like(there, 7.0)
    packed = None if must is None else bitmap.pack(must).to(machine)
    call = select_call(there, packed, counts, mass, tiles, first, words, weights)
    of_mask = masked_calls.located(
        mask if mask.allowed is None else TileMask((), mask.allowed.to(machine)), tiles
    )
    machine_of(machine).run(masked_calls.select_call(call, of_mask, shares), there.device)
    assert torch.equal(bitmap.unpack(words.cpu(), columns), expected)
    assert (weights.cpu()[~allowed] == 0).all()
    again = there[None].clone()
    softmax = masked_calls.softmax_call(coarse_calls.softmax_call(again), of_mask, first)
    machine_of(machine).run(softmax, there.device)
    assert torch.equal(again[0].nan_to_num(5), weights.nan_to_num(5))
    plain = scores.isfinite().all(-1)
    true = torch_coarse.weights_of(scores[None].double(), allowed)[0]
    torch.testing.assert_close(weights.cpu()[plain].double(), true[plain], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("heads", [0, 1, 4], ids=["rule", "tensor", "tensor-of-heads"])
def test_the_coarse_branch_and_its_gradient(name: str, heads: int) -> None:
    """Against PyTorch's own operators, two key heads for four query heads, in two slices."""
    mask, grid, kv_grid = on_tiles(name)
    if heads:
        mask = as_tensor(mask, grid, heads)
    q = torch.randn(1, 4, grid.num_tiles, 64)
    k, v = torch.randn(2, 1, 2, kv_grid.num_tiles, 64)
    unseen = ~mask.seen(2, q.device)
    for x in (k, v):
        x.masked_fill_(unseen[..., None], torch.nan)
    choosing = mask.choosing()
    if choosing is not None:
        q.masked_fill_(~choosing[..., None], torch.nan)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    true = torch_coarse.attention(*wide, 0.2, mask)
    grad = torch.randn_like(q)
    truths = torch.autograd.grad((true * grad).sum(), wide)
    machine = machine_of("cpu")
    out = coarse_select.attend(machine, q, k, v, 0.2, mask)
    torch.testing.assert_close(out.double(), true.detach(), rtol=1e-4, atol=2e-6)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    coarse_backward.coarse_attention_backward(machine, grad, out, (q, k, v), 0.2, found, mask)
    for mine, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=5e-6)


def blocks_met(mask: TileMask, grid: Grid, rows: int, first: int = 0) -> Tensor:
    """(row blocks, column blocks) of 64: whether some query of a block may choose some key."""
    allowed = mask.matrix(grid.num_tiles, None)[0]
    allowed = allowed[(first + torch.arange(rows)) % grid.num_tiles]
    return torch.stack(
        [
            torch.stack([part.any() for part in block.split(64, dim=1)])
            for block in allowed.split(64)
        ]
    )


@pytest.mark.parametrize("first", [0, 32, 40])
@pytest.mark.parametrize("name", ["causal", "window of chunks", "forcing", "near"])
def test_scores_that_nobody_may_choose_are_never_made(name: str, first: int) -> None:
    mask, grid, kv_grid = on_tiles(name)
    rows, columns = 2 * grid.num_tiles - first, kv_grid.num_tiles
    left, right = torch.randn(1, rows, 64), torch.randn(1, columns, 64)
    out = torch.full((1, rows, columns), torch.inf)
    of_mask = masked_calls.located(mask, grid.num_tiles)
    call = coarse_calls.products_call(coarse_calls.product(left, right, out))
    machine_of("cpu").run(masked_calls.products_call(call, of_mask, first, 0), out.device)
    made = torch.stack(
        [
            torch.stack([part.isfinite().all() for part in block.split(64, dim=1)])
            for block in out[0].split(64)
        ]
    )
    met = blocks_met(mask, grid, rows, first)
    if name == "near":  # by layers alone
        assert not (met & ~made).any()
    else:
        assert torch.equal(made, met)
    assert not made.all()
    torch.testing.assert_close(
        out.masked_fill(out.isinf(), 0), (left @ right.mT).masked_fill(out.isinf(), 0)
    )


def test_a_causal_mask_is_about_half_of_the_work() -> None:
    """The training mask of 21 frames in chunks of 3: 4 / 7 of the scores, and blocks at its edge.

    The blocks are counted by what the emulator has written.
    """
    grid = Grid((21, 30, 52), tile=(3, 5, 4))
    mask = masks.resolve(ChunkCausal(3), grid, grid, 1)
    assert mask is not None and grid.num_tiles == 546
    x = torch.randn(1, grid.num_tiles, 16)
    out = torch.full((1, grid.num_tiles, grid.num_tiles), torch.inf)
    call = coarse_calls.products_call(coarse_calls.product(x, x, out))
    of_mask = masked_calls.located(mask, grid.num_tiles)
    machine_of("cpu").run(masked_calls.products_call(call, of_mask, 0, 0), out.device)
    made = out.isfinite().double().mean().item()
    assert 4 / 7 <= made < 0.68, made


@pytest.mark.parametrize("name", ["causal", "window of chunks", "forcing"])
def test_steps_of_what_nobody_may_choose_are_never_made(name: str) -> None:
    """What they would have read is NaN, on either side of the products."""
    mask, grid, kv_grid = on_tiles(name)
    rows, columns = grid.num_tiles, kv_grid.num_tiles
    met = blocks_met(mask, grid, rows)
    of_mask = masked_calls.located(mask, rows)
    values = torch.randn(1, columns, 64)
    for block in range(len(met)):
        weights = torch.zeros(1, rows, columns)
        poisoned = values.clone()
        for column, there in enumerate(met[block].tolist()):
            poisoned[0, 64 * column : 64 * column + 64] *= 1.0 if there else torch.nan
        out = torch.full((1, rows, 64), torch.inf)
        call = coarse_calls.products_call(coarse_calls.product(weights, poisoned.mT, out))
        machine_of("cpu").run(masked_calls.products_call(call, of_mask, 0, 1), out.device)
        assert (out[0, 64 * block : 64 * block + 64] == 0).all()
    for block in range(met.shape[1]):
        upstream = torch.randn(1, rows, 64)
        for row, there in enumerate(met[:, block].tolist()):
            upstream[0, 64 * row : 64 * row + 64] *= 1.0 if there else torch.nan
        out = torch.full((1, columns, 64), torch.inf)
        weights = torch.zeros(1, rows, columns)
        call = coarse_calls.products_call(coarse_calls.product(weights.mT, upstream.mT, out))
        machine_of("cpu").run(masked_calls.products_call(call, of_mask, 0, 2), out.device)
        assert (out[0, 64 * block : 64 * block + 64] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_means_of_tiles_that_nobody_may_choose_are_zeros(dtype: torch.dtype) -> None:
    mask, grid, kv_grid = on_tiles("window of chunks")
    q = torch.randn(2, grid.length, 2, 16).to(dtype)
    k = torch.randn(2, kv_grid.length, 1, 16).to(dtype)
    seen = mask.seen(1, k.device)[0]
    plain = coarse_select.tile_means(machine_of("cpu"), (q, k), (grid, kv_grid))
    k[:, ~seen[kv_grid.tile_of_token()]] = torch.nan
    found = [torch.full_like(mean, 7.0) for mean in plain]
    call = masked_calls.means_call(means_call((q, k), (grid, kv_grid), found), mask.rule, 1)
    machine_of("cpu").run(call, q.device)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1].masked_fill(~seen[:, None], 0))
    assert not seen.all()


def test_calls_of_other_tiles_are_refused() -> None:
    from vsa import _C

    mask, grid, kv_grid = on_tiles("window of chunks")
    scores = torch.randn(grid.num_tiles, kv_grid.num_tiles)
    words = torch.empty(grid.num_tiles, 16, dtype=torch.int32)
    call = select_call(scores, None, [1], 0.0, grid.num_tiles, 0, words, None)
    other = masked_calls.LocatedMask(on_tiles("causal")[0].rule, None, grid.num_tiles)
    with pytest.raises(RuntimeError, match="for other numbers of tiles"):
        masked_calls.select_call(call, other, [0.0]).emulate(1, 0)
    right = masked_calls.located(mask, grid.num_tiles)
    with pytest.raises(RuntimeError, match="as many shares as counts"):
        masked_calls.select_call(call, right, []).emulate(1, 0)
    with pytest.raises(RuntimeError, match="12 numbers, not 1"):
        _C.MaskedSelectTiles(
            select=call, mask=_C.MaskOfTiles(rule=[1], allowed=0, mask_heads=0), shares=[0.0]
        ).emulate(1, 0)
    x = torch.randn(1, 4, 4)
    product = coarse_calls.products_call(coarse_calls.product(x, x, torch.empty(1, 4, 4)))
    with pytest.raises(RuntimeError, match="another number of key tiles"):
        masked_calls.products_call(product, right, 0, 0).emulate(1, 0)
    with pytest.raises(RuntimeError, match="sides of a product"):
        masked_calls.products_call(product, right, 0, 3).emulate(1, 0)
    assert vsa.masks.ChunkCausal is ChunkCausal
