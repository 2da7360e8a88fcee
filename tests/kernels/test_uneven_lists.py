# SPDX-License-Identifier: Apache-2.0
"""Neighbours that want nearly all of many tiles and few, far apart: a block's consumers then pass
over tiles, drain what they hold and turn pages of the plan, in the sizes that a GPU runs with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends import BACKENDS
from vsa.verify import parity

TILE = (1, 2, 2)
FEW = vsa.Grid((1, 2, 14), TILE)
# More than two chunks of steps, and than the words of a bitmap that a plan puts in order together.
MANY = vsa.Grid((1, 2, 600), TILE)


def _uneven(rows: int, columns: int) -> Tensor:
    """(rows, columns): by turns nearly everything and every 24th."""
    mask = torch.rand(rows, columns) < 0.9
    for row in range(1, rows, 2):
        mask[row] = (torch.arange(columns) + 7 * row) % 24 == 0
    return mask


def _results(
    machine: tuple[str, str], tensors: list[Tensor], upstream: Tensor, selection: vsa.Selection
) -> list[Tensor]:
    """The output and dq, dk, dv."""
    backend, device = machine
    leaves = [x.to(device).detach().requires_grad_() for x in tensors]
    out = vsa.block_sparse_attention(*leaves, selection.to(device), backend=backend)
    grads = torch.autograd.grad(out, leaves, upstream.to(out))
    return [x.detach().cpu() for x in (out, *grads)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("many_keys", [True, False], ids=["rows", "columns"])
def test_uneven_neighbours(
    many_keys: bool, head_dim: int, machine: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKENDS["emulated"].machine, "blocks", 1)
    grid, kv_grid = (FEW, MANY) if many_keys else (MANY, FEW)
    mask = torch.stack([_uneven(FEW.num_tiles, MANY.num_tiles) for _ in range(2)])[None]
    selection = vsa.Selection.from_mask(mask if many_keys else mask.mT, grid, kv_grid)
    q, upstream = torch.randn(2, 1, grid.length, 2, head_dim).bfloat16()
    k, v = torch.randn(2, 1, kv_grid.length, 1, head_dim).bfloat16()
    found = _results(machine, [q, k, v], upstream, selection)
    wide = [x.double() for x in (q, k, v)]
    true = _results(("torch", "cpu"), wide, upstream, selection)
    for x, truth in zip(found, true, strict=True):
        assert parity.error(x, truth) < 0.005
