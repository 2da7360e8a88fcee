# SPDX-License-Identifier: Apache-2.0
"""Numbers about selections on masks made by hand, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from python.no_work import is_named

import vsa
from vsa import diagnostics, plots
from vsa.diagnostics import theme
from vsa.values import bitmap

GRID = vsa.Grid((4, 8, 12))  # 1 x 2 x 3 tiles


def selection(*heads: list[str], grid: vsa.Grid | None = GRID) -> vsa.Selection:
    """One batch element; a string of 0 and 1 per query tile."""
    rows = [[[bit == "1" for bit in row] for row in head] for head in heads]
    return vsa.Selection.from_mask(torch.tensor([rows]), grid)


A = ["110000", "011000", "000000", "111111", "111111", "100000"]
B = ["100001", "011000", "111000", "000000", "111111", "000001"]


@given(rows=st.integers(1, 4), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_bits_are_counted(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(bitmap.count(bitmap.pack(mask)), mask.sum(-1))
    assert bitmap.count(torch.full((2, 3), -1, dtype=torch.int32)).tolist() == [96, 96]


def test_density_per_head() -> None:
    both = selection(A, B)
    torch.testing.assert_close(diagnostics.density(both), torch.tensor([[17 / 36, 14 / 36]]))
    assert both.density == pytest.approx(31 / 72)


def test_overlap_of_two_selections() -> None:
    a, b = selection(A), selection(B)
    assert diagnostics.overlap(a, a).item() == 1
    shared = 1 + 2 + 0 + 0 + 6 + 0
    torch.testing.assert_close(diagnostics.overlap(a, b), torch.tensor([[2 * shared / (17 + 14)]]))
    assert torch.equal(diagnostics.overlap(a, b), diagnostics.overlap(b, a))
    none = selection(["000000"] * 6)
    assert diagnostics.overlap(a, none).item() == 0 and diagnostics.overlap(none, none).isnan()


def test_overlap_of_neighbours_along_each_axis() -> None:
    found = diagnostics.neighbour_overlap(selection(A))
    # along h: tiles 0-3, 1-4, 2-5; along w: 0-1, 1-2, 3-4, 4-5
    assert found.h.item() == pytest.approx(2 * (2 + 2 + 0) / (2 + 2 + 0 + 6 + 6 + 1))
    assert found.w.item() == pytest.approx(2 * (1 + 0 + 6 + 1) / (2 + 2 + 2 + 0 + 6 + 6 + 6 + 1))
    assert found.t.isnan()


def test_overlap_between_heads() -> None:
    found = diagnostics.head_overlap(selection(A, B, A))
    between = 2 * 9 / 31
    expected = torch.tensor([[1, between, 1], [between, 1, between], [1, between, 1]])
    torch.testing.assert_close(found[0], expected)


def test_unrelated_choices_overlap_as_much_as_they_keep() -> None:
    mask = torch.rand(2, 1, 2, 300, 100) < 0.2
    a, b = (vsa.Selection.from_mask(one) for one in mask)
    torch.testing.assert_close(
        diagnostics.overlap(a, b), torch.full((1, 2), 0.2), atol=0.02, rtol=0
    )


def test_recall_curve_is_the_recall_of_each_budget() -> None:
    q, k = torch.randn(2, 2, 5, 6, 10, 2, 16)
    topks = (1, 0.25, vsa.TopP(0.8, 2), (3, 7), 1.0)
    curve = diagnostics.recall_curve(q, k, topks)
    assert curve.topks == topks and curve.recall.shape == curve.density.shape == (5, 2, 2)
    for topk, density, recall in zip(topks, curve.density, curve.recall, strict=True):
        one = vsa.select(q, k, topk)
        torch.testing.assert_close(recall, one.recall(q, k))
        torch.testing.assert_close(density, diagnostics.density(one))
    torch.testing.assert_close(curve.recall[-1], torch.ones(2, 2))
    assert not curve.recall.requires_grad


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a and b", lambda path: diagnostics.overlap(selection(A), selection(A, B))),
        ("grid", lambda path: diagnostics.neighbour_overlap(selection(A, grid=None))),
        ("topks", lambda path: diagnostics.recall_curve(*torch.randn(2, 1, 4, 4, 4, 1, 8), [])),
        ("grids", lambda path: plots.tile_map(selection(A, grid=None), 0, path)),
        ("query", lambda path: plots.tile_map(selection(A), 6, path)),
        ("query[2]", lambda path: plots.tile_map(selection(A), (0, 1, 3), path)),
        ("head", lambda path: plots.tile_map(selection(A), 0, path, head=1)),
        ("batch", lambda path: plots.tile_map(selection(A), 0, path, batch=1)),
    ],
)
def test_bad_input_is_named(name: str, call: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        call(tmp_path / "nothing.png")
    assert is_named(name, str(caught.value))
    assert len(str(caught.value).split()) >= 5 and not list(tmp_path.iterdir())


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


@pytest.mark.parametrize("heads", [1, 3, 20])
def test_pictures_are_drawn(heads: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    some = selection(*[A, B, A, B, A] * 4)
    some = vsa.Selection.from_mask(some.mask()[:, :heads], GRID)
    plots.head_overlap(some, path)
    assert min(size_of(path)) > 400
    for head, query in ((None, 4), (0, (0, 1, 2))):
        plots.tile_map(some, query, path, head=head)
        width, height = size_of(path)
        assert width > height > 150
    q, k = torch.randn(2, 1, 4, 8, 12, heads, 8)
    plots.recall(diagnostics.recall_curve(q, k, [1, 0.5, vsa.TopP(0.9), 1.0]), str(path))
    assert size_of(path) == (1125, 690)
    everything = diagnostics.recall_curve(q, k, [1.0])
    plots.recall(everything, path)


def test_a_missing_matplotlib_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theme, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[demo\]' in a clone"):
        plots.head_overlap(selection(A, B), tmp_path / "picture.png")
