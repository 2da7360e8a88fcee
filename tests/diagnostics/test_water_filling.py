# SPDX-License-Identifier: Apache-2.0
"""Tiles are shared out so that the worst head is as good as it can be, at exactly the total."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from vsa.diagnostics import water_filling
from vsa.diagnostics.water_filling import fill_for_error, fill_for_mean, water_fill


def curves(heads: int, n: int) -> Tensor:
    shares = torch.randn(heads, n, dtype=torch.float64).mul(2).softmax(-1)
    return shares.cumsum(-1)


def worst(rows: Tensor, counts: Tensor) -> float:
    return float(rows.gather(1, counts[:, None] - 1).min())


@pytest.mark.parametrize("least", [1, 2])
def test_no_other_shares_have_a_better_worst_head(least: int) -> None:
    for _ in range(20):
        rows = curves(3, 5)
        for total in range(3 * least, 16):
            counts = water_fill(rows, total, least)
            assert int(counts.sum()) == total and int(counts.min()) >= least
            best = max(
                worst(rows, torch.tensor(other))
                for other in product(range(least, 6), repeat=3)
                if sum(other) == total
            )
            assert worst(rows, counts) == best


def test_what_is_left_goes_to_the_worst_that_it_helps() -> None:
    flat = torch.tensor(
        [
            [0.2, 0.2, 0.2, 1.0],  # three more tiles are needed to help it
            [0.5, 0.9, 0.95, 1.0],
            [0.6, 0.8, 0.9, 1.0],
        ],
        dtype=torch.float64,
    )
    assert water_fill(flat, 3).tolist() == [1, 1, 1]
    assert water_fill(flat, 4).tolist() == [1, 2, 1]
    assert water_fill(flat, 5).tolist() == [1, 2, 2]
    assert water_fill(flat, 6).tolist() == [4, 1, 1]
    assert water_fill(flat, 12).tolist() == [4, 4, 4]


def test_heads_with_equal_curves_differ_by_a_tile_at_most() -> None:
    rows = curves(1, 9).expand(4, -1)
    for total in range(4, 37):
        counts = water_fill(rows, total)
        assert int(counts.sum()) == total and int(counts.max() - counts.min()) <= 1


def test_tiles_that_hold_nothing_are_the_last_to_be_given() -> None:
    empty = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.8, 1.0]], dtype=torch.float64)
    assert water_fill(empty, 4).tolist() == [1, 3]
    assert water_fill(empty, 5).tolist() == [2, 3]


@pytest.mark.parametrize("least", [1, 2])
def test_no_other_shares_have_a_better_mean(least: int) -> None:
    for _ in range(20):
        shares = torch.randn(3, 5, dtype=torch.float64).softmax(-1)
        rows = shares.sort(-1, descending=True).values.cumsum(-1)
        for total in range(3 * least, 16):
            counts = fill_for_mean(rows, total, least)
            assert int(counts.sum()) == total and int(counts.min()) >= least
            best = max(
                float(rows.gather(1, torch.tensor(other)[:, None] - 1).sum())
                for other in product(range(least, 6), repeat=3)
                if sum(other) == total
            )
            found = float(rows.gather(1, counts[:, None] - 1).sum())
            assert found == pytest.approx(best, abs=1e-12)


def test_a_gain_that_comes_late_counts_for_the_tiles_before_it() -> None:
    late = torch.tensor([[0.1, 0.1, 0.1, 1.0], [0.4, 0.6, 0.8, 1.0]], dtype=torch.float64)
    assert fill_for_mean(late, 5).tolist() == [4, 1]  # 0.3 for each of three, against 0.2
    assert fill_for_mean(late, 8).tolist() == [4, 4] and fill_for_mean(late, 2).tolist() == [1, 1]
    assert fill_for_mean(late, 8, least=4).tolist() == [4, 4]


def best_sum(errors: Tensor, total: int, least: int) -> float:
    return min(
        float(errors.gather(1, torch.tensor(other)[:, None] - 1).sum())
        for other in product(range(least, errors.shape[1] + 1), repeat=len(errors))
        if sum(other) == total
    )


def reached(errors: Tensor, counts: Tensor) -> float:
    return float(errors.gather(1, counts[:, None] - 1).sum())


@pytest.mark.parametrize("least", [1, 2])
def test_no_other_shares_have_a_smaller_error(least: int) -> None:
    for _ in range(10):
        errors = torch.rand(3, 5, dtype=torch.float64)  # these rise and fall
        errors[:, -1] = 0
        for total in range(3 * least, 16):
            counts = fill_for_error(errors, total, least)
            assert int(counts.sum()) == total and int(counts.min()) >= least
            assert torch.equal(counts, fill_for_error(errors, total, least))
            assert reached(errors, counts) == pytest.approx(best_sum(errors, total, least))


def test_a_narrow_band_is_right_wherever_no_run_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(water_filling, "BAND", 0)
    exact = 0
    for _ in range(10):
        errors = torch.rand(3, 5, dtype=torch.float64)
        errors[:, -1] = 0
        best = [best_sum(errors, total, 1) for total in range(3, 16)]
        found = [reached(errors, fill_for_error(errors, total)) for total in range(3, 16)]
        hull = [best[0]]  # of the best sums, which no sum goes below
        for total in range(1, 13):
            around = [
                best[i] + (best[j] - best[i]) * (total - i) / (j - i)
                for i in range(total)
                for j in range(total, 13)
            ]
            hull.append(min(around))
        for low, least, own in zip(hull, best, found, strict=True):
            assert own >= least - 1e-12
            if least <= low + 1e-12:
                exact += 1
                assert own == pytest.approx(least)
    assert exact > 40


def test_heads_that_nothing_helps_share_evenly() -> None:
    assert fill_for_error(torch.zeros(3, 4, dtype=torch.float64), 8).tolist() == [3, 3, 2]
    steep = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    assert fill_for_error(steep, 6).tolist() in ([4, 1, 1], [1, 4, 1], [1, 1, 4])
    assert reached(steep, fill_for_error(steep, 7)) == 2.0


@pytest.mark.parametrize("fill", [water_fill, fill_for_mean, fill_for_error])
@pytest.mark.parametrize("total", [1, 7])
def test_totals_that_cannot_be_shared_out(fill: Callable[..., Tensor], total: int) -> None:
    with pytest.raises(ValueError, match="total must be from 2 to 6 for 2 heads of 1 to 3 tiles"):
        fill(curves(2, 3), total)
