# SPDX-License-Identifier: Apache-2.0
"""bench/reuse.py: how many tiles share a load, along which axis."""

from __future__ import annotations

import forked
import pytest
import torch

import reuse
import vsa

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


def two_heads() -> vsa.Selection:
    """One head whose neighbours along t keep the same tiles, one whose neighbours along w do."""
    grid, kv_grid = vsa.Grid((12, 8, 12)), vsa.Grid((4, 4, 24))
    along_t = torch.eye(6, dtype=torch.bool).repeat(3, 1)
    along_w = torch.eye(6, dtype=torch.bool).repeat_interleave(3, 0)
    return vsa.Selection.from_mask(torch.stack((along_t, along_w))[None], grid, kv_grid)


def test_each_head_has_an_axis_along_which_it_shares_more() -> None:
    selection = two_heads()
    assert reuse.better_axes(selection, 3).tolist() == [[1, 0]]
    along_w, along_t, chosen, better = reuse.reuses(selection, 3)
    assert chosen == better == 3 and along_w < 3 and along_t < 3


def test_keys_are_read_by_the_queries_that_attend_them() -> None:
    selection = two_heads()
    assert torch.equal(reuse.turned(selection).mask(), selection.mask().mT)
    assert reuse.turned(selection).grid == selection.kv_grid


def test_the_command_prints_a_row_for_each_pattern() -> None:
    done = forked.run(reuse.__file__, "--layers", "8x8x8:2", "--topk", 0.25)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if "8x8x8" in line]
    assert [row[1].split(",")[0].strip() for row in rows] == ["random", "correlated"]
    assert all(1 <= float(cell) <= 3 for row in rows for cell in row[2:10])
