# SPDX-License-Identifier: Apache-2.0
"""Bad sequences, and bad input beside good ones: one sentence, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from python.no_work import NoWork

import vsa
from vsa import Segment

MIXED = vsa.Sequence([5, Segment((1, 3, 4), topk=1, name="reference"), (2, 4, 4)])
OWN = vsa.Sequence([5, Segment((1, 3, 4), topk=1), Segment((2, 4, 4), topk=0.5)])
ONE = vsa.Sequence([Segment(5, coarse=True), (2, 4, 4)])


def tokens(length: int = MIXED.length) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, length, 2, 16) for name in "qkv"}


X, NINE, FIFTY = tokens(), tokens(9), tokens(50)
SHORT = X | {name: X[name][:, 1:] for name in "kv"}
VIDEO = torch.zeros(1, 7, 7, 1, 2, 16)
LOW = {name: x.bfloat16() for name, x in X.items()}
REAL, NUMBERS, MUST = torch.ones(1, 49).bool(), torch.ones(1, 5), torch.ones(3, 3).bool()
GATE = torch.ones(1, 3, 2, 16)
OF_GRID = vsa.Selection.from_mask(torch.ones(1, 2, 4, 4).bool(), vsa.Grid((1, 7, 7)))
MASK = torch.ones(1, 2, 2, 3).bool()
CHOSEN = vsa.select(X["q"], X["k"], 1, grid=MIXED)
made = vsa.Sequence
part = Segment
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no segments": (lambda: made([]), ValueError, "segments must hold at least one segment"),
    "one segment alone": (lambda: made(Segment(5)), TypeError, "segments must be a list of"),
    "a word": (lambda: made("abc"), TypeError, "segments must be a list of vsa.Segment"),
    "a grid in it": (
        lambda: made([vsa.Grid((1, 2, 3))]), TypeError, r"segments\[0\] must be a vsa.Segment"),
    "no tokens": (lambda: made([5, 0]), ValueError, r"segments\[1\]: shape must be at least 1"),
    "two sides": (lambda: made([(2, 3)]), TypeError, r"segments\[0\]: shape must be three token"),
    "names twice": (
        lambda: made([part(3, name="text"), part(4, name="text")]), ValueError,
        "segments must have names that differ, but two of them are named 'text'"),
    "a name that is none": (lambda: part(3, name=7), TypeError, "name must be a word or None"),
    "an unknown name": (
        lambda: MIXED.tokens_of("video"), ValueError, r"name must be that of a segment \('refer"),
    "an unknown place": (lambda: MIXED.segment(3), ValueError, "name must be .* a place below 3"),
    "a budget of what is kept": (
        lambda: part(5, topk=2), ValueError,
        "topk must be None for a segment that does not compete, but it is 2"),
    "a budget of nothing": (
        lambda: part((1, 2, 3), topk=0), ValueError, "topk must be at least 1"),
    "a budget in a tensor": (
        lambda: part((1, 2, 3), topk=NUMBERS), TypeError, "topk of a segment must be"),
    "another word for keys": (
        lambda: part(5, keys="dense"), ValueError, "keys must be 'kept' or 'compete', but"),
    "another word for queries": (
        lambda: part(5, queries="kept"), ValueError, "queries must be 'dense' or 'sparse', but"),
    "no coarse part where one must be": (
        lambda: part((1, 2, 3), coarse=False), ValueError, "coarse may be False only where keys"),
    "coarse in words": (lambda: part(5, coarse="no"), TypeError, "coarse must be True or False"),
    "a tile of text with three sides": (
        lambda: part(5, (4, 4, 4)), TypeError, "tile must be a whole number, but it is"),
    "a large tile of text": (
        lambda: part(500, 257), ValueError, "tile must hold at most 256 tokens, but it is 257"),
    "a large tile of a video": (
        lambda: part((9, 9, 9), (8, 8, 8)), ValueError, "tile must hold at most 256 tokens"),
    "all dense": (
        lambda: vsa.attention(**NINE, topk=1, grid=made([5, 4])), ValueError,
        "grid must have a segment whose queries are sparse"),
    "all kept": (
        lambda: vsa.attention(**NINE, topk=1, grid=made([part((1, 3, 3), keys="kept")])),
        ValueError, "grid must have a segment whose keys compete, but all of them are kept"),
    "segments that do not add up": (
        lambda: vsa.attention(**FIFTY, topk=1, grid=MIXED), ValueError,
        r"q has 50 tokens in its sequence, but the segments of its grid have 49: 5 \+ 1\*3\*4 \+"),
    "keys that do not add up": (
        lambda: vsa.attention(**SHORT, topk=1, grid=MIXED),
        ValueError, "k has 48 tokens in its sequence, but the segments of its grid have 49"),
    "a video": (
        lambda: vsa.attention(*[VIDEO] * 3, 1, grid=MIXED), ValueError,
        r"q must be flat, \(B, S, heads, head_dim\), for a vsa.Sequence"),
    "a tile beside it": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, tile=(2, 2, 2)), ValueError,
        "tile must be left out where a grid is a vsa.Sequence"),
    "keys without queries": (
        lambda: vsa.attention(**X, topk=1, kv_grid=MIXED), ValueError,
        "grid must be given where kv_grid is a vsa.Sequence, but it is None"),
    "no budget": (
        lambda: vsa.attention(**X, topk=None, grid=MIXED), TypeError, "topk "),
    "a budget that nobody shares": (
        lambda: vsa.attention(**X, topk=2, grid=OWN), ValueError,
        "topk must be None where all segments that compete have a topk of their own, but it is 2"),
    "a budget of one video that has its own": (
        lambda: vsa.attention(
            **X, topk=2, grid=made([5, part((4, 11, 1), topk=1)])), ValueError,
        "topk must be None where all segments that compete have a topk of their own"),
    "a budget for three heads": (
        lambda: vsa.attention(
            **X, topk=2, grid=made([5, part((1, 3, 4), topk=(1, 2, 1)), (2, 4, 4)])),
        ValueError, "topk as a tuple must have one number per query head, but it has 3 for 2"),
    "text_valid of tokens of the video": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, text_valid=REAL),
        ValueError, r"text_valid must be \(B, tokens of all flat segments\) = \(1, 5\)"),
    "text_valid of numbers": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, text_valid=NUMBERS),
        TypeError, "text_valid must be a bool tensor, but it is torch.float32"),
    "text_valid of other text": (
        lambda: vsa.attention(
            **X, topk=1, grid=MIXED, kv_grid=made([4, 1, (1, 3, 4), (2, 4, 4)]),
            text_valid=REAL[:, :5]),
        ValueError, "text_valid needs kv_grid to have the flat segments of grid"),
    "a gate that does not broadcast": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, gate_coarse=GATE),
        ValueError, "gate_coarse must be broadcastable to q"),
    "another score": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, score=vsa.SubBlocks(2)), ValueError,
        "score must be 'mean' for this grid"),
    "a tail": (
        lambda: vsa.attention(**X, topk=1, grid=MIXED, tail=True), ValueError,
        "tail must be False for this grid, but it is True"),
    "a tail of the fine stage": (
        lambda: vsa.block_sparse_attention(**X, selection=CHOSEN, tail=True), ValueError,
        "tail must be False for this grid"),
    "eight bits": (
        lambda: vsa.attention(
            **LOW, topk=1, grid=MIXED, precision="fp8"),
        ValueError, "precision must be 'native' for this grid, but it is 'fp8'"),
    "a choice of another sequence": (
        lambda: vsa.attention(**X, topk=None, grid=OWN, selection=CHOSEN), ValueError,
        "selection was made for the grid"),
    "a choice of a grid": (
        lambda: vsa.attention(
            **X, topk=None, grid=MIXED,
            selection=OF_GRID),
        ValueError, "selection must be for"),
    "a mask of other tiles": (
        lambda: vsa.Selection.from_mask(MASK, MIXED), ValueError,
        "mask has 3 tiles on axis 3, but kv_grid has 2"),
    "must of all tiles": (
        lambda: vsa.select(X["q"], X["k"], 1, grid=MIXED, must=MUST),
        ValueError, r"must has to be \(n_q, n_k\) = \(2, 2\), the tiles whose queries are sparse"),
    "must of numbers": (
        lambda: vsa.select(X["q"], X["k"], 1, grid=MIXED, must=NUMBERS), TypeError,
        "must is a bool mask"),
    "must of itself where it is not": (
        lambda: vsa.select(
            X["q"], X["k"], 1, grid=made([part(5, keys="compete"), (1, 3, 4), (2, 4, 4)]),
            must="self"),
        ValueError, 'must="self" needs the segments whose queries are sparse to be those that'),
    "where only a grid is taken": (
        lambda: vsa.diagnostics.recall_curve(X["q"], X["k"], [1], grid=MIXED), TypeError,
        r"grid must be \(T, H, W\) or a vsa.Grid here, but it is a vsa.Sequence"),
    "operations of a share of the mass": (
        lambda: vsa.flops(MIXED, 2, 16, vsa.TopP(0.5)), ValueError, "topk must say how many"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence(name: str) -> None:
    call, kind, sentence = WRONG[name]
    with pytest.raises(kind, match="^" + sentence) as found, NoWork():
        call()
    assert str(found.value).count(". ") == 0 and len(str(found.value).split()) >= 5


def test_what_is_right_is_taken() -> None:
    """Else any sentence would do."""
    for grid, topk in ((MIXED, 1), (OWN, None), (ONE, 1)):
        x = tokens(grid.length)
        assert vsa.attention(**x, topk=topk, grid=grid).shape == x["q"].shape
    shape = 1, ONE.length, 2, 64
    low = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in "qkv"}
    out = vsa.attention(**low, topk=1, grid=ONE, gate_coarse=low["q"], precision="fp8")
    assert out.shape == shape
