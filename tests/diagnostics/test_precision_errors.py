# SPDX-License-Identifier: Apache-2.0
"""Errors of low precision by layer and head: what they are, and what is chosen by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vsa
from vsa.diagnostics import PrecisionErrors, watch_precision

GRID = vsa.Grid((4, 8, 16))
TEXT = vsa.Grid((4, 8, 16), prefix=5, suffix=9)


def noted(grid: vsa.Grid = GRID, seed: int = 0, batch: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, grid.length, heads, 64) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return [q, k, v, vsa.select(q, k, 3, grid=grid)]


def errors_of(names: list[str], *calls: list[Any], **options: Any) -> PrecisionErrors:
    errors = PrecisionErrors(names, **options)
    for name, (q, k, v, selection) in zip(names, calls, strict=True):
        errors.note(name, q, k, v, selection=selection)
    return errors


def distance(out: Tensor, native: Tensor, over: tuple[int, ...]) -> Tensor:
    out, native = out.double(), native.double()
    return ((out - native).square().sum(over) / native.square().sum(over)).sqrt()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_they_are_distances_to_native(precision) -> None:
    q, k, v, selection = call = noted()
    errors = errors_of(["a"], call, tiles=99)
    out, native = (
        vsa.block_sparse_attention(q, k, v, selection, precision=each)
        for each in (precision, "native")
    )
    expected = distance(out, native, (0, 1, 3))
    torch.testing.assert_close(errors.of(precision)[0], expected, rtol=0.02, atol=0)
    tiles = distance(GRID.to_tiles(out), GRID.to_tiles(native), (2, 4)).amax((0, 1))
    torch.testing.assert_close(errors.worst_tile(precision)[0], tiles, rtol=0.1, atol=0)
    assert (errors.worst_tile(precision) > errors.of(precision)).all()


def test_a_few_tiles_are_a_sample_of_them() -> None:
    call = noted()
    few, all_ = (errors_of(["a"], call, tiles=tiles) for tiles in (2, 99))
    assert not torch.equal(few.of("int8"), all_.of("int8"))
    torch.testing.assert_close(few.of("int8"), all_.of("int8"), rtol=0.2, atol=0)


def test_text_is_left_out() -> None:
    q, k, v, selection = noted(TEXT)
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[:, :5], x[:, -9:] = torch.nan, torch.inf
    for found in (errors_of(["a"], [*x, selection]) for x in ((q, k, v), spoiled)):
        assert found.grid == GRID and found.of("int8").isfinite().all()


def test_steps_and_layers_stand_apart_and_calls_of_a_step_together() -> None:
    errors = PrecisionErrors(["a", "b", "c"], precisions=["int8"])
    one, other = noted(seed=1), noted(seed=2)
    other[0] = 8 * other[0]
    for name, step, (q, k, v, selection) in (
        ("a", 0, one),
        ("a", 3, other),
        ("b", 0, one),
        ("b", 0, other),
    ):
        errors.note(name, q, k, v, selection=selection, step=step)
    assert errors.steps == [0, 3]
    table = errors.of("int8")
    assert table.shape == (3, 4) and table[2].isnan().all() and table[:2].isfinite().all()
    torch.testing.assert_close(table[0], table[1])
    first, last = errors.of("int8", [0]), errors.of("int8", [3])
    assert last[1].isnan().all() and not torch.equal(first[0], last[0])
    low, high = torch.minimum(first[0], last[0]), torch.maximum(first[0], last[0])
    assert (low <= table[0]).all() and (table[0] <= high).all()
    worst = errors.worst_tile("int8")
    assert torch.equal(
        worst[0], torch.maximum(*(errors.worst_tile("int8", [n])[0] for n in (0, 3)))
    )


def test_layers_that_mind_stay_native() -> None:
    calm, sharp = noted(seed=1), noted(seed=2)
    sharp[0] = 6 * sharp[0]  # e4m3 scores err in proportion
    spoiled = noted(seed=3)
    spoiled[2] = spoiled[2].index_fill(1, torch.arange(40), torch.inf)
    errors = errors_of(["calm", "sharp", "spoiled"], calm, sharp, spoiled)
    errors.layers.append("never called")
    assert errors.choose(0.07) == ["fp8", "int8", "native", "native"]
    assert errors.choose(0.048) == ["int8", "int8", "native", "native"]
    assert errors.choose(0.01) == ["native"] * 4
    table = errors.of("fp8")[0]
    between = (table.mean().item() + table.max().item()) / 2
    assert errors.choose(between)[0] == "int8" and errors.choose(between, aim="mean")[0] == "fp8"
    only = errors_of(["calm"], calm, precisions=("fp8",))
    assert only.choose(0.048) == ["native"] and only.choose(0.07) == ["fp8"]


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda e, c: e.note("x", *c[:3], selection=c[3]), ValueError, "layer must be one of"),
        (lambda e, c: e.note("a", *c[:3], selection=vsa.Selection.from_mask(c[3].mask())),
         ValueError, "selection must know one grid"),
        (lambda e, c: e.note("a", *(x[:, 1:] for x in c[:3]), selection=c[3]),
         ValueError, "q has 511 tokens"),
        (lambda e, c: e.note("a", *(x.float() for x in c[:3]), selection=c[3]),
         TypeError, "q must be bf16 or fp16 for precision"),
        (lambda e, c: e.note("a", c[0], c[1], None, selection=c[3]), TypeError, "v must be a"),
        (lambda e, c: e.of("int8"), ValueError, "nothing was noted in the steps"),
        (lambda e, c: e.of("native"), ValueError, "precision must be one of 'fp8', 'int8', which"),
        (lambda e, c: e.choose(0.0), ValueError, "at_most must be a number in"),
        (lambda e, c: e.choose("low"), TypeError, "at_most must be a number in"),
        (lambda e, c: e.choose(0.1, aim="least"), ValueError, 'aim must be "worst" or "mean"'),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, kind, sentence) -> None:
    errors = PrecisionErrors(["a", "b"])
    with pytest.raises(kind, match=sentence):
        call(errors, noted())
    assert errors.grid is None and errors.steps == []  # nothing was noted


def test_arguments_are_checked() -> None:
    for options, kind, sentence in (
        ({"precisions": []}, TypeError, "precisions must be a list"),
        ({"precisions": "int8"}, TypeError, "precisions must be a list"),
        ({"precisions": ["native"]}, ValueError, "precisions must be of 'fp8' and 'int8', but one"),
        ({"tiles": 0}, ValueError, "tiles must be at least 1"),
    ):
        with pytest.raises(kind, match=sentence):
            PrecisionErrors(["a"], **options)
    with pytest.raises(ValueError, match="layers must have names of their own"):
        PrecisionErrors(["a", "a"])
    errors = errors_of(["a"], noted())
    other = vsa.Grid((4, 8, 8))
    with pytest.raises(ValueError, match=r"of \(4, 8, 16\) in tiles of .*: make one for each"):
        q, k, v, selection = noted(other)
        errors.note("a", q, k, v, selection=selection)
    q, k, v, selection = noted()
    with pytest.raises(ValueError, match="q must have 4 heads as before, but it has 2"):
        errors.note("a", q[:, :, :2], k, v, selection=vsa.select(q[:, :, :2], k, 3, grid=GRID))


def test_a_model_is_watched_while_it_runs() -> None:
    model = torch.nn.Sequential(
        *(vsa.nn.VideoSparseAttention(128, 2, topk=3, gates="both") for _ in range(2))
    )
    x = torch.randn(1, 4, 8, 16, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with watch_precision(model) as errors:
            assert torch.equal(model(x), before)
            model(x)
        assert errors.layers == ["0", "1"] and errors.steps == [0, 1]
        assert (errors.of("int8") > 0).all() and (errors.of("fp8") > errors.of("int8")).any()
        for layer, precision in zip(model, errors.choose(1.0), strict=True):
            layer.precision = precision
        assert not torch.equal(model(x), before)
    with (
        pytest.raises(ValueError, match=r"model must hold a vsa\.nn\.Video"),
        watch_precision(torch.nn.Linear(2, 2)),
    ):
        pass


def test_a_layer_computes_in_the_precision_that_it_is_given() -> None:
    layer = vsa.nn.VideoSparseAttention(128, 2, topk=3, gates=None, precision="int8").bfloat16()
    x = torch.randn(1, 4, 8, 16, 128).bfloat16()
    assert "precision=int8" in repr(layer)
    with pytest.raises(ValueError, match="q wants a gradient, but precision='int8'"):
        layer(x)
    with torch.no_grad():
        q, k, v, *_ = layer.projections(x)
        expected = layer.to_out(vsa.attention(q, k, v, 3, precision="int8").flatten(-2))
        assert torch.equal(layer(x), expected)
        layer.precision = "native"
        assert not torch.equal(layer(x), expected) and "precision" not in repr(layer)
    with pytest.raises(ValueError, match='precision must be "native", "int8" or "fp8"'):
        vsa.nn.VideoSparseAttention(128, 2, precision="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tail must be False for precision='fp8'"):
        vsa.nn.VideoSparseAttention(128, 2, tail=True, precision="fp8")


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    errors = errors_of(["a", "b"], noted(), noted(seed=1))
    errors.layers.append("never called")
    vsa.plots.precision_errors(errors, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was noted"):
        vsa.plots.precision_errors(PrecisionErrors(["a"]), tmp_path / "none.png")
