# SPDX-License-Identifier: Apache-2.0
"""select: top-k with its ties, forced tiles, the bitmap, and what a selection says of itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import vsa
from vsa.values import bitmap
from vsa.verify import reference


@given(
    scores=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=70),
    topk=st.integers(1, 80),
)
def test_ties_go_to_the_lowest_tile(scores: list[float], topk: int) -> None:
    columns = len(scores)
    keys = torch.tensor(scores)[None, None, :, None]
    words = torch.ops.vsa.select_tiles(
        torch.ones(1, 1, 1, 1),
        keys,
        None,
        [min(topk, columns)],
        0.0,
        None,
        1.0,
        "torch",
        [],
        None,
        [],
    )
    chosen = bitmap.unpack(words, columns).flatten().nonzero().flatten().tolist()
    assert chosen == reference.best(scores, topk)


def test_nan_counts_as_the_lowest_score() -> None:
    keys = torch.tensor([1.0, float("nan"), -5.0, float("-inf")])[None, None, :, None]
    words = torch.ops.vsa.select_tiles(
        torch.ones(1, 1, 1, 1), keys, None, [3], 0.0, None, 1.0, "torch", [], None, []
    )
    assert bitmap.unpack(words, 4).flatten().tolist() == [True, True, True, False]


def test_forced_tiles_count_inside_topk_and_all_stay() -> None:
    q, k = torch.randn(2, 2, 1, 1, 64 * 9, 3, 8)
    plain = vsa.select(q, k, 4, tile=(1, 1, 64)).mask()
    must = torch.zeros(9, 9, dtype=torch.bool)
    must[0, :7] = True
    must[1, 5] = True
    kept = vsa.select(q, k, 4, tile=(1, 1, 64), must=must).mask()
    assert (kept & must).sum() == 6 * must.sum()
    assert (kept.sum(-1) == torch.tensor([7, 4, 4, 4, 4, 4, 4, 4, 4])).all()
    assert torch.equal(kept[:, :, 2:], plain[:, :, 2:])
    own = vsa.select(q, k, 4, tile=(1, 1, 64), must="self").mask()
    assert own.diagonal(dim1=-2, dim2=-1).all() and (own.sum(-1) == 4).all()


@pytest.mark.parametrize(
    ("topk", "kept"), [(1, 1), (5, 5), (99, 12), (1.0, 12), (0.5, 6), (0.51, 7), (1e-9, 1)]
)
def test_topk_is_a_count_or_a_share(topk: float, kept: int) -> None:
    q, k = torch.randn(2, 1, 5, 6, 10, 2, 8)
    selection = vsa.select(q, k, topk)
    assert selection.shape == (1, 2, 12, 12)
    assert (selection.mask().sum(-1) == kept).all()
    assert selection.density == pytest.approx(kept / 12)


def test_every_query_head_of_a_group_chooses_for_itself() -> None:
    q, k = torch.randn(1, 5, 6, 10, 4, 8), torch.randn(1, 5, 6, 10, 2, 8)
    grouped = vsa.select(q, k, 3).mask()
    assert torch.equal(grouped, vsa.select(q, k.repeat_interleave(2, -2), 3).mask())
    assert not torch.equal(grouped[:, 0], grouped[:, 1])


def test_scores_are_fp32_for_narrow_inputs() -> None:
    """Tile means that differ by less than a bf16 step still rank."""
    q = torch.ones(1, 1, 1, 64, 1, 1, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 1, 64 * 4, 1, 1, dtype=torch.bfloat16)
    k[0, 0, 0, 64 * 2, 0, 0] = 1.0078125
    selection = vsa.select(q, k, 1, kv_grid=(1, 1, 256), tile=(1, 1, 64))
    assert selection.mask().flatten().tolist() == [False, False, True, False]


@given(rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 9))
def test_bitmap_round_trip_and_layout(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    selection = vsa.Selection.from_mask(mask)
    assert torch.equal(selection.mask(), mask)
    assert torch.equal(selection.transpose().mask(), mask.mT)
    assert selection.bitmap.dtype == torch.int32
    assert selection.bitmap.shape == (1, 2, rows, -(-columns // 32))
    words = selection.bitmap.to(torch.int64) & 0xFFFFFFFF
    for j in range(words.shape[-1] * 32):
        bit = words[..., j // 32] >> (j % 32) & 1
        assert torch.equal(
            bit.bool(), mask[..., j] if j < columns else torch.zeros_like(mask[..., 0])
        )


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 63, 64, 100])
def test_a_full_row_has_every_bit_and_no_spare_one(columns: int) -> None:
    everything = torch.ones(1, columns, dtype=torch.bool)
    assert torch.equal(bitmap.full(columns, torch.device("cpu")), bitmap.pack(everything)[0])


def test_recall_is_the_dense_mass_of_the_kept_tiles() -> None:
    grid = vsa.Grid((5, 6, 7))
    q, k = torch.randn(2, 2, grid.tokens, 4, 16, dtype=torch.float64)
    k = k[:, :, ::2]
    selection = vsa.select(q, k, 3, grid=grid)
    weights = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(2, 2).transpose(1, 2),
        torch.eye(grid.tokens).double().expand(2, 4, -1, -1),
    )
    tile = grid.tile_of_token()
    kept = selection.mask()[:, :, tile][..., tile]
    torch.testing.assert_close(selection.recall(q, k), (weights * kept).sum(-1).mean(-1))
    everything = vsa.Selection.from_mask(torch.ones(2, 4, 8, 8, dtype=torch.bool))
    torch.testing.assert_close(everything.recall(q, k, grid=grid), torch.ones(2, 4).double())


def test_topk_beats_a_random_choice_on_clustered_tokens() -> None:
    centres = torch.randn(8, 16)
    grid = vsa.Grid((4, 8, 16))
    q = k = (
        centres[grid.tile_of_token()][None, :, None] * 2 + torch.randn(1, grid.tokens, 1, 16) * 0.3
    )
    assert vsa.select(q, k, 2, grid=grid).recall(q, k).item() > 0.5


def test_a_selection_moves_and_describes_itself() -> None:
    selection = vsa.select(*torch.randn(2, 1, 5, 6, 7, 2, 16), 3)
    assert repr(selection) == "Selection(batch=1, heads=2, query_tiles=8, key_tiles=8)"
    assert selection.to("cpu").shape == selection.shape
    assert selection.grid == selection.kv_grid == vsa.Grid((5, 6, 7))
