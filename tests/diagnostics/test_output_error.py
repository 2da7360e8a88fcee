# SPDX-License-Identifier: Apache-2.0
"""Errors of the output at every budget, against attention over the tiles themselves in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa
from vsa.diagnostics import Curves, watch
from vsa.diagnostics.curves import tile_scores
from vsa.diagnostics.output_error import error_by_count

GRID = vsa.Grid((5, 6, 7), tile=(2, 3, 4))
TEXT = vsa.Grid((5, 6, 7), tile=(2, 3, 4), prefix=5, suffix=9)
N = GRID.num_tiles


def random(grid: vsa.Grid, heads: int = 4, kv_heads: int = 2, **options: Any) -> list[Tensor]:
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(2, grid.length, each, 16, **options) for each in shapes)
    return [3 * q, k, v]


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: vsa.Grid,
    count: int,
    tiles: Tensor,
    gate: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """|out_n - out|^2 and |out|^2 (B, heads) per token of some query tiles, by masked softmax."""
    kept = vsa.select(q, k, count, grid=grid).mask()
    video = slice(grid.prefix, grid.prefix + grid.tokens)
    tile = grid.tile_of_token()
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).double() for x in (k, v))
    allowed = torch.ones(*kept.shape[:2], grid.tokens, grid.length, dtype=torch.bool)
    allowed[..., video] = kept[:, :, tile][..., tile]
    everything = torch.ones_like(allowed)
    if valid is not None:
        text = torch.ones(len(q), grid.length, dtype=torch.bool)
        text[:, : grid.prefix], text[:, video.stop :] = valid.split((grid.prefix, grid.suffix), 1)
        allowed &= text[:, None, None]
        everything &= text[:, None, None]
        k, v = (x.masked_fill(~text[:, :, None, None], 0) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, video].double(), k) / q.shape[-1] ** 0.5
    out, dense = (
        torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
        for mask in (allowed, everything)
    )
    factor = 1.0 if gate is None else gate[:, video].double()
    rows = torch.isin(tile, tiles)
    off, dense = ((factor * x)[:, rows].square().sum(-1).mean(1) for x in (out - dense, dense))
    return off, dense


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "text"])
def test_errors_are_those_of_attention_over_the_tiles(grid: vsa.Grid, gated: bool) -> None:
    q, k, v = random(grid, dtype=torch.float64)
    gate = torch.randn_like(q) if gated else None
    valid = None
    if grid.text:
        valid = torch.rand(2, grid.text) < 0.7
        valid[1] = False
        places = [*range(grid.prefix), *range(grid.prefix + grid.tokens, grid.length)]
        for batch, place in (~valid).nonzero().tolist():
            k[batch, places[place]] = v[batch, places[place]] = float("nan")
    for tiles in (torch.tensor([0, 3, 7]), torch.arange(N)):
        order = tile_scores(q, k, grid, tiles).argsort(dim=-1, descending=True, stable=True)
        found, norms = error_by_count(
            q, k, v, grid, order, chosen=tiles, gate=gate, text_valid=valid
        )
        for count in (1, 2, 5, N - 1, N):
            error, square = expected(q, k, v, grid, count, tiles, gate, valid)
            torch.testing.assert_close(found[..., count - 1], error, rtol=1e-9, atol=1e-20)
            torch.testing.assert_close(norms, square, rtol=1e-9, atol=0)
        assert (found[..., 0] > 1e-3).all() and (found[..., -1] == 0).all()


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(GRID, dtype=torch.float64)
    order = tile_scores(q, k, GRID).argsort(dim=-1, descending=True, stable=True)
    whole = error_by_count(q, k, v, GRID, order)
    monkeypatch.setattr("vsa.diagnostics.dense.SLICE_BYTES", 1)
    for a, b in zip(whole, error_by_count(q, k, v, GRID, order), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-20)


def test_tiles_that_weigh_nothing_beside_later_ones_are_attended_all_the_same() -> None:
    grid = vsa.Grid((4, 4, 8))  # two tiles
    q, k, v = (torch.randn(1, grid.tokens, 1, 16) for _ in range(3))
    last = grid.tile_of_token() == 1
    q[..., 0], k[:, :, :, 0] = 40, torch.where(last, 40.0, -40.0)[:, None]  # exp(-800)
    order = torch.tensor([0, 1]).expand(1, 1, 2, 2)  # the worse tile first
    found, norms = error_by_count(q, k, v, grid, order)
    first, dense = (
        (q[0, :, 0].double() @ k[0, at, 0].double().T / 4).softmax(-1) @ v[0, at, 0].double()
        for at in (~last, last)
    )
    torch.testing.assert_close(
        found[0, 0, 0].double(), (first - dense).square().sum(-1).mean(), rtol=1e-4, atol=0
    )
    assert found[0, 0, 1] == 0
    square = dense.square().sum(-1).mean()
    torch.testing.assert_close(norms[0, 0].double(), square, rtol=1e-4, atol=0)


def test_16_bits_are_measured_in_fp32_whatever_autocast_says() -> None:
    q, k, v = (x.bfloat16() for x in random(GRID))
    plain, cast, exact = Curves(["a"]), Curves(["a"]), Curves(["a"])
    plain.note("a", q, k, v, grid=GRID)
    with torch.autocast("cpu", torch.bfloat16):
        cast.note("a", q, k, v, grid=GRID)
    exact.note("a", q.double(), k.double(), v.double(), grid=GRID)
    assert torch.equal(plain.error_of("a"), cast.error_of("a"))
    torch.testing.assert_close(plain.error_of("a"), exact.error_of("a"), rtol=1e-4, atol=1e-7)


def test_errors_are_relative_to_the_layer_and_averaged_over_calls_and_steps() -> None:
    curves = Curves(["a", "b"], tiles=99)
    parts = [random(GRID) for _ in range(3)]
    for (q, k, v), step, unit in zip(parts, (0, 0, 4), (1, 100, 1e-3), strict=True):
        curves.note("a", q, k, unit * v, grid=GRID, step=step)  # a unit of v changes nothing
    whole = (GRID.sizes == 24).nonzero()[:, 0]
    each = []
    for q, k, v in parts:
        numbers = [expected(q, k, v, GRID, count, whole) for count in range(1, N + 1)]
        squares = numbers[0][1].sum()
        each.append(torch.stack([error.sum(0) for error, _ in numbers], 1) / squares)
    options: Any = {"rtol": 1e-4, "atol": 1e-9}
    torch.testing.assert_close(curves.error_of("a", [4]), each[2], **options)
    torch.testing.assert_close(curves.error_of("a", [0]), (each[0] + each[1]) / 2, **options)
    mean = ((each[0] + each[1]) / 2 + each[2]) / 2
    torch.testing.assert_close(curves.error_of("a"), mean, **options)
    none = Curves(["a"])
    none.note("a", parts[0][0], parts[0][1], torch.zeros_like(parts[0][2]), grid=GRID)
    assert not none.error_of("a").any()  # no output, no error


def test_a_layer_is_watched_with_its_values_its_gate_and_its_text() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 2, 0.25, kv_heads=1, gates="both", tile=(2, 3, 4))
    assert layer.to_gate_fine is not None
    nn.init.normal_(layer.to_gate_fine.weight)
    x, valid = torch.randn(2, TEXT.length, 32), torch.rand(2, TEXT.text) < 0.7
    with torch.no_grad(), watch(nn.Sequential(layer), tiles=99) as curves:
        layer(x, TEXT, text_valid=valid)
        q, k, v, _, gate = layer.projections(x)
    by_hand = Curves(["0"], tiles=99)
    by_hand.note("0", q, k, v, grid=TEXT, gate_fine=gate, text_valid=valid)
    torch.testing.assert_close(curves.error_of("0"), by_hand.error_of("0"))
    whole = (GRID.sizes == 24).nonzero()[:, 0]
    error, square = expected(q, k, v, TEXT, 3, whole, gate, valid)
    torch.testing.assert_close(
        curves.error_of("0")[:, 2], error.sum(0) / square.sum(), rtol=1e-3, atol=1e-7
    )
    video = torch.randn(1, 5, 6, 7, 32)  # and so it is where the video has its shape
    with torch.no_grad(), watch(nn.Sequential(layer)) as curves:
        layer(video)
    assert 0 < curves.error_of("0")[:, 0].sum() < 10


def test_bad_notes_of_values() -> None:
    q, k, v = random(GRID)
    curves = Curves(["a"])
    with pytest.raises(ValueError, match="v has 209 tokens"):
        curves.note("a", q, k, v[:, 1:], grid=GRID)
    with pytest.raises(ValueError, match="v must have the shape of k"):
        curves.note("a", q, k, v[..., 1:], grid=GRID)
    with pytest.raises(ValueError, match="gate_fine must be broadcastable to q"):
        curves.note("a", q, k, v, grid=GRID, gate_fine=q[:, 1:])
    with pytest.raises(ValueError, match=r"text_valid must be \(B, prefix \+ suffix\) = \(2, 0\)"):
        curves.note("a", q, k, v, grid=GRID, text_valid=torch.ones(2, 3, dtype=torch.bool))
    curves.note("a", q, k, v, grid=GRID)
    with pytest.raises(ValueError, match="v must be given as in the step's other calls, but it w"):
        curves.note("a", q, k, grid=GRID)
    curves.note("a", q, k, grid=GRID, step=1)
    assert curves.has_errors("a", [0]) and not curves.has_errors("a")
    with pytest.raises(ValueError, match="source must have noted layer 'a' with its values"):
        curves.error_of("a")
    with pytest.raises(ValueError, match="nothing was noted of layer 'a' in the steps"):
        curves.error_of("a", [7])
    curves.note("a", q, k, v * float("nan"), grid=GRID, step=2)
    assert curves.of("a").isfinite().all()
    with pytest.raises(ValueError, match="must have noted finite numbers, but in layer 'a' some"):
        curves.error_of("a", [2])
