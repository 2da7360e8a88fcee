# SPDX-License-Identifier: Apache-2.0
"""In which order blocks take tiles, and along which axis those of a block are neighbours: each
head's choice, and what it must not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vsa
from vsa import _C
from vsa.backends import BACKENDS
from vsa.backends.kernels.forward import neighbour_axes
from vsa.values import bitmap
from vsa.values.grid import Extent
from vsa.verify import parity

Machine = tuple[str, str]
KINDS = ("random", "along w", "along t")
SAMPLES = 32
EMULATOR = BACKENDS["emulated"].machine


def _lists(kind: str, tiles: Extent, columns: Extent, sharing: int = 1) -> Tensor:
    """A mask of some heads, (sharing, rows, columns); along an axis all want the same."""
    sizes = [*tiles, *columns]
    for axis in {"random": (), "along t": (0, 3), "along w": (2, 5)}[kind]:
        sizes[axis] = 1
    mask = torch.rand(sharing, *sizes) < 0.4
    return mask.expand(sharing, *tiles, *columns).flatten(4).flatten(1, 3)


def _order(heads: Tensor, tiles: Extent) -> int:
    """Of a group of heads (heads, rows, columns): what sampled tiles say.

    What they have in common along t, less what they differ by in length, against the same along w;
    backwards where rows grow.
    """
    layers, lines, length = tiles
    rows = heads.movedim(0, 1).flatten(1).unflatten(0, tiles).long()
    along_t, grown = 0, 0
    for sample in range(SAMPLES):
        t = sample * (layers - 1) // SAMPLES
        h = sample * 5 % SAMPLES * lines // SAMPLES
        w = sample * 7 % SAMPLES * (length - 1) // SAMPLES
        own = rows[t, h, w]
        grown += (2 * sample - SAMPLES) * int(own.sum())
        if layers == 1 or length == 1:
            continue
        for other, sign in ((rows[t + 1, h, w], 1), (rows[t, h, w + 1], -1)):
            shared, longer = int((own & other).sum()), int(other.sum() - own.sum())
            along_t += sign * (shared - abs(longer))
    axis = _C.ALONG_T if (layers > 1 if length == 1 else along_t > 0) else _C.ALONG_W
    return axis + (_C.BACKWARDS if grown > 0 else 0)


@pytest.mark.parametrize("sharing", [1, 3])
@pytest.mark.parametrize(
    "tiles",
    [(2, 1, 2), (3, 2, 4), (5, 7, 3), (8, 12, 20), (1, 3, 5), (4, 3, 1), (1, 4, 1), (1, 1, 1)],
    ids=lambda tiles: "x".join(map(str, tiles)),
)
def test_the_order_that_the_samples_speak_for_is_chosen(
    tiles: Extent, sharing: int, machine: Machine
) -> None:
    """Of each group of heads; along w in one layer, along t where there is one tile along w."""
    groups = [_lists(KINDS[i % 3], tiles, (3, 5, 75), sharing) for i in range(6)]
    words = bitmap.pack(torch.stack(groups).unflatten(0, (2, 3)).flatten(1, 2))
    runner = BACKENDS[machine[0]].machine
    found = neighbour_axes(runner, words.to(machine[1]), tiles, groups=3).flatten().tolist()
    assert found == [_order(heads, tiles) for heads in groups]
    if min(tiles[0], tiles[2]) > 2:
        assert [axis & 1 for axis in found[1::3]] == [_C.ALONG_W] * 2
        assert [axis & 1 for axis in found[2::3]] == [_C.ALONG_T] * 2


def _rows(lengths: Tensor, columns: int) -> Tensor:
    """Random rows of these lengths, (1, rows, columns)."""
    ranks = torch.rand(len(lengths), columns).argsort(1).argsort(1)
    return (ranks < lengths[:, None])[None]


def test_rows_of_one_length_are_taken_in_order() -> None:
    """Whatever they hold, and also where lengths differ by a few from row to row."""
    tiles, columns = (6, 5, 7), 600
    even = torch.full((6 * 5 * 7,), 75)
    for lengths in (even, even + torch.randint(-6, 7, even.shape)):
        words = bitmap.pack(_rows(lengths, columns))[None]
        assert neighbour_axes(EMULATOR, words, tiles, groups=1).item() < _C.BACKWARDS


@pytest.mark.parametrize("kind", ["causal", "anticausal", "along w"])
def test_rows_that_grow_are_taken_from_the_longest_on(kind: str, machine: Machine) -> None:
    """And side by side with rows of their own length, though more is shared otherwise."""
    tiles, columns = (7, 6, 13), 546
    layer, place = torch.arange(7 * 6 * 13) // 78, torch.arange(7 * 6 * 13) % 13
    grown = {"causal": layer, "anticausal": 6 - layer, "along w": place}[kind]
    mask = _rows(10 * (grown + 1), columns)
    words = bitmap.pack(mask)[None].to(machine[1])
    found = neighbour_axes(BACKENDS[machine[0]].machine, words, tiles, groups=1).item()
    if kind == "along w":  # where the order does not matter
        assert found & 1 == _C.ALONG_T
    else:
        assert found == _C.ALONG_W + (_C.BACKWARDS if kind == "causal" else 0)


def test_a_sample_is_spread_over_all_tiles() -> None:
    """A head whose lists change from one half of the video to the other is judged by both."""
    tiles = (8, 6, 10)
    along = {kind: _lists(kind, tiles, (4, 4, 8)).unflatten(1, tiles) for kind in KINDS[1:]}
    for axis, length in enumerate(tiles, start=1):
        for first, second in (KINDS[1:], KINDS[:0:-1]):
            mask = along[first].clone()
            late = torch.arange(length) >= length - length // 3
            mask.movedim(axis, 0)[late] = along[second].movedim(axis, 0)[late]
            words = bitmap.pack(mask.flatten(1, 3)[None])
            expected = _C.ALONG_T if first == "along t" else _C.ALONG_W
            assert neighbour_axes(EMULATOR, words, tiles, groups=1).item() & 1 == expected


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("shape", "kv_shape"),
    [((9, 7, 14), (9, 7, 14)), ((13, 5, 9), (4, 9, 17)), ((3, 9, 10), (17, 6, 11))],
    ids=["one grid", "keys of one layer", "queries of one layer"],
)
def test_heads_that_choose_differently_attend_what_they_selected(
    shape: Extent, kv_shape: Extent, head_dim: int, machine: Machine
) -> None:
    backend, device = machine
    text = {"prefix": 70, "suffix": 5}
    grid, kv_grid = vsa.Grid(shape, **text), vsa.Grid(kv_shape, **text)
    kinds = ("along t", "along w", "along w", "along t")
    mask = torch.stack(
        [
            torch.cat([_lists(kind, grid.tiles, kv_grid.tiles, 2) for kind in of_batch])
            for of_batch in (kinds[:2], kinds[2:])
        ]
    )
    selection = vsa.Selection.from_mask(mask, grid, kv_grid)
    if grid.tiles[0] > 1:
        axes = neighbour_axes(EMULATOR, selection.bitmap, grid.tiles, groups=4)
        assert (axes & 1).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    if kv_grid.tiles[0] > 1:
        axes = neighbour_axes(EMULATOR, selection.transpose().bitmap, kv_grid.tiles, groups=2)
        assert (axes & 1).tolist() == [[1, 0], [0, 1]]
    q, upstream = torch.randn(2, 2, grid.length, 4, head_dim).bfloat16()
    k, v = torch.randn(2, 2, kv_grid.length, 2, head_dim).bfloat16()

    def results(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = vsa.block_sparse_attention(*leaves, selection.to(device), backend=backend)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(out)))]

    found = results(backend, device, torch.bfloat16)
    for x, truth in zip(found, results("torch", "cpu", torch.float64), strict=True):
        assert parity.error(x, truth) < 0.005
