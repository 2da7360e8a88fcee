# SPDX-License-Identifier: Apache-2.0
"""What is noted of a run by layer and step, and the reports of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vsa
from vsa import diagnostics
from vsa.diagnostics.record import Record

GRID = vsa.Grid((5, 6, 7), tile=(2, 3, 4))
TEXT = vsa.Grid((5, 6, 7), tile=(2, 3, 4), prefix=5, suffix=9)


def noted(grid: vsa.Grid = GRID) -> tuple[torch.Tensor, torch.Tensor, vsa.Selection]:
    q, k = torch.randn(2, 2, grid.length, 3, 16).unbind()
    return q, k, vsa.select(q, k, (2, 3, 6), grid=grid)


@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "text"])
def test_sampled_recall_is_the_mean_over_whole_tiles(grid: vsa.Grid) -> None:
    q, k, selection = noted(grid)
    video = slice(grid.prefix, grid.prefix + grid.tokens)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, video], k[:, video]) / 4
    tile = GRID.tile_of_token()
    kept = selection.mask()[:, :, tile][..., tile]
    shares = (scores.softmax(-1) * kept).sum(-1)  # (B, heads, tokens)
    whole = (GRID.sizes == 24)[tile]
    expected = shares[..., whole].mean(-1)
    found = diagnostics.sampled_recall(selection, q, k, tiles=99)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    first = diagnostics.sampled_recall(selection, q, k, tiles=1)
    torch.testing.assert_close(first, shares[..., tile == 0].mean(-1), rtol=1e-4, atol=1e-5)


def test_sampled_recall_needs_one_grid_that_fits() -> None:
    q, k, selection = noted()
    with pytest.raises(ValueError, match="selection must know one grid"):
        diagnostics.sampled_recall(vsa.Selection.from_mask(selection.mask()), q, k, tiles=2)
    with pytest.raises(ValueError, match="k has 209 tokens"):
        diagnostics.sampled_recall(selection, q, k[:, 1:], tiles=2)
    with pytest.raises(ValueError, match="tiles must be at least 1"):
        diagnostics.sampled_recall(selection, q, k, tiles=0)


def test_a_record_is_a_table_with_gaps_where_dense() -> None:
    record = Record(3, every=2, maps=[1])
    q, k, selection = noted(TEXT)
    assert [record.begin(step) for step in range(4)] == [True, False, True, False]
    record.note(1, 2, q, k, selection)
    record.note(1, 2, q, k, selection)
    assert record.steps == [0, 2] and record.grid == GRID
    assert record.density.shape == record.recall.shape == (3, 2, 3)
    assert record.density.isnan().sum() == 15 and not record.recall[1, 1].isnan().any()
    torch.testing.assert_close(record.density[1, 1], torch.tensor([2.0, 3.0, 6.0]) / 12)
    shares = record.tile_map(1, 2)
    assert shares is not None and shares.shape == GRID.tiles
    expected = selection.mask()[0, :, record.query].float().mean(0)
    assert torch.equal(shares.flatten(), expected)
    assert record.tile_map(0, 2) is None
    with pytest.raises(ValueError, match=r"selection is for the grid \(4, 4, 4\)"):
        x = torch.randn(1, 64, 3, 16)
        record.note(0, 0, x, x, vsa.select(x, x, 1, grid=(4, 4, 4)))
    with pytest.raises(ValueError, match="selection must know its grid"):
        record.note(0, 0, q, k, vsa.Selection.from_mask(selection.mask()))


@pytest.mark.parametrize("maps", [(), (0, 2)], ids=["without maps", "with maps"])
def test_reports(tmp_path: Path, maps: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    record = Record(3, maps=maps)
    for step in range(5):
        record.begin(step)
        for layer in (0, 2) if step else ():
            record.note(layer, step, *noted())
    picture, page = tmp_path / "run.png", tmp_path / "run.html"
    record.report(picture)
    record.report(str(page))
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "5x6x7 tokens in 12 tiles of 2x3x4" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # it needs no other file
    assert re.search(r"<td>1</td>(<td>dense</td>){4}", text) and "<td>30.6%</td>" in text
    with pytest.raises(ValueError, match=r"path must end in \.html or \.png"):
        record.report(tmp_path / "run.pdf")


def test_bad_records_are_refused_and_empty_ones_say_why() -> None:
    for arguments, kind, words in (
        ({"layers": 0}, ValueError, "layers must be at least 1"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"tiles": 1.5}, TypeError, "tiles must be a whole number"),
        ({"maps": [4]}, ValueError, "maps must be numbers of layers from 0 to 3"),
    ):
        with pytest.raises(kind, match=words):
            Record(**{"layers": 4, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this record is empty"):
        Record(2).report("run.png")


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_collect_sees_what_a_transformer_keeps(compiled: bool) -> None:
    pytest.importorskip("diffusers")
    from integrations.tiny_transformers import BATCH, run, wan

    from vsa.integrations.diffusers import apply_vsa, collect

    model, inputs = wan()

    def denoise(*timesteps: float) -> Any:
        for timestep in timesteps:  # twice, as guidance does
            for _ in range(2):
                run(model, {**inputs, "timestep": torch.full((BATCH,), timestep)})

    with pytest.raises(ValueError, match="call apply_vsa"), collect(model):
        pass
    apply_vsa(model, topk=lambda layer, step: None if step == 0 else (1.0, 0.5))
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with collect(model, every=2, tiles=2) as record:
        denoise(900.0, 800.0, 700.0, 600.0, 500.0)
        with pytest.raises(ValueError, match="recorded already"), collect(model):
            pass
    denoise(400.0)
    assert record.steps == [0, 2, 4] and list(record.maps) == [0, 1]
    assert record.density[:, 0].isnan().all()
    torch.testing.assert_close(record.density[:, 1:, 0], torch.ones(2, 2))
    torch.testing.assert_close(record.recall[:, 1:, 0], torch.ones(2, 2))
    assert (record.recall[:, 1:, 1] < 0.9).all() and record.tile_map(1, 4) is not None
    assert compiled == all(block._compiled_call_impl is not None for block in model.blocks)


@torch.no_grad()
def test_collect_measures_selections_that_are_taken_again() -> None:
    pytest.importorskip("diffusers")
    from integrations.tiny_transformers import BATCH, hunyuan, run

    from vsa.integrations.diffusers import apply_vsa, collect

    model, inputs = hunyuan()
    apply_vsa(model, topk=2, refresh_every=3)
    with collect(model, tiles=99) as record:
        for timestep in (900.0, 800.0):
            other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
            run(model, {**other, "timestep": torch.full((BATCH,), timestep)})
    assert not record.recall.isnan().any()
    assert torch.equal(record.tile_map(0, 0), record.tile_map(0, 1))
    assert not torch.equal(record.recall[:, 0], record.recall[:, 1])
