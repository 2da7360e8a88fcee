# SPDX-License-Identifier: Apache-2.0
"""Bad input: one sentence that names the argument, before any work is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vsa

Q = torch.randn(1, 4, 4, 8, 2, 16)
FLAT = Q.flatten(1, 3)
MASK = torch.ones(1, 2, 2, 2, dtype=torch.bool)
OF_OTHER_TILES = vsa.select(Q, Q, 1, tile=(2, 4, 8))
TEXT = vsa.Grid((4, 4, 8), prefix=2)
WITH_TEXT = torch.randn(1, TEXT.length, 2, 16)


def attend(
    q: object = Q, k: object = Q, v: object = Q, topk: object = 1, **options: object
) -> object:
    return vsa.attention(q, k, v, topk, **options)


def flat(**options: object) -> object:
    return attend(FLAT, FLAT, FLAT, **options)


class NoWork(TorchDispatchMode):
    """Every operator of ours is work, whoever calls it."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "vsa":
            pytest.fail(f"{func} ran before the input was checked")
        return func(*args, **(kwargs or {}))


def test_work_is_noticed() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"vsa\.tile_means.* ran before"), NoWork():
        attend(gate_coarse=Q)


CASES: list[tuple[str, type[Exception], Callable[[], object]]] = [
    ("q", TypeError, lambda: attend(q="video")),
    ("q", ValueError, lambda: attend(q=Q[0])),
    ("q", ValueError, lambda: attend(q=Q[:0])),
    ("q", TypeError, lambda: attend(q=Q.long())),
    ("q", ValueError, lambda: attend(q=Q.transpose(-1, -2))),
    ("q", ValueError, lambda: flat(grid=(4, 4, 9))),
    ("k", TypeError, lambda: attend(k=Q.bfloat16())),
    ("k", ValueError, lambda: attend(k=Q.to("meta"))),
    ("k", ValueError, lambda: attend(k=FLAT, v=FLAT)),
    ("k", ValueError, lambda: attend(k=Q[..., :8], v=Q[..., :8])),
    ("k", ValueError, lambda: attend(q=Q[..., :1, :], k=Q, v=Q)),
    ("k", ValueError, lambda: attend(k=Q[:, :, :, :4], v=Q[:, :, :, :4])),
    ("k", ValueError, lambda: flat(grid=(4, 4, 8), kv_grid=(4, 4, 4))),
    ("v", ValueError, lambda: attend(v=Q[:, :2])),
    ("topk", ValueError, lambda: attend(topk=0)),
    ("topk", ValueError, lambda: attend(topk=-3)),
    ("topk", ValueError, lambda: attend(topk=0.0)),
    ("topk", ValueError, lambda: attend(topk=1.5)),
    ("topk", ValueError, lambda: attend(topk=float("nan"))),
    ("topk", TypeError, lambda: attend(topk="32")),
    ("topk", TypeError, lambda: attend(topk=True)),
    ("topk", TypeError, lambda: attend(topk=None)),
    ("topk", ValueError, lambda: attend(topk=(1, 2, 3))),
    ("topk[1]", ValueError, lambda: attend(topk=(1, 0))),
    ("topk[0]", TypeError, lambda: vsa.select(Q, Q, ("few", 1))),
    ("topk", ValueError, lambda: vsa.flops((4, 4, 4), 2, 64, vsa.TopP(0.9))),
    ("topk", ValueError, lambda: vsa.nn.VideoSparseAttention(32, 4, topk=(1, 2))),
    ("mass", ValueError, lambda: vsa.TopP(0.0)),
    ("mass", ValueError, lambda: vsa.TopP(90)),
    ("mass", TypeError, lambda: vsa.TopP("most")),
    ("floor", ValueError, lambda: vsa.TopP(0.9, 0)),
    ("floor", ValueError, lambda: vsa.TopP(0.9, 1.5)),
    ("floor", TypeError, lambda: vsa.TopP(0.9, None)),
    ("grid", ValueError, lambda: attend(grid=(4, 8, 4))),
    ("grid", TypeError, lambda: flat(grid=(4, 32))),
    ("grid", TypeError, lambda: flat(grid=128)),
    ("grid", ValueError, lambda: attend(grid=TEXT)),
    ("grid", ValueError, lambda: vsa.Grid((0, 4, 4))),
    ("grid", TypeError, lambda: vsa.Grid((4, 4, 4.0))),
    ("kv_grid", TypeError, lambda: attend(kv_grid="same")),
    ("kv_grid", ValueError, lambda: attend(kv_grid=(4, 4, 4))),
    ("tile", ValueError, lambda: attend(tile=(4, 4, 5))),
    ("tile", ValueError, lambda: attend(tile="best")),
    ("tile", TypeError, lambda: attend(tile=4)),
    ("tile", ValueError, lambda: attend(tile=(4, 0, 4))),
    ("tile", ValueError, lambda: attend(grid=vsa.Grid((4, 4, 8)), tile=(2, 4, 8))),
    ("prefix", ValueError, lambda: vsa.Grid((4, 4, 4), prefix=-1)),
    ("suffix", TypeError, lambda: vsa.Grid((4, 4, 4), suffix=1.5)),
    ("gate_coarse", ValueError, lambda: attend(gate_coarse=torch.ones(3))),
    ("gate_coarse", TypeError, lambda: attend(gate_coarse=0.5)),
    ("gate_fine", ValueError, lambda: attend(gate_fine=torch.ones(1, 1, 1, 1, 1, 2, 16))),
    ("scale", TypeError, lambda: attend(scale="auto")),
    ("scale", ValueError, lambda: attend(scale=float("inf"))),
    ("selection", TypeError, lambda: attend(selection=MASK)),
    ("selection", ValueError, lambda: attend(selection=vsa.Selection.from_mask(MASK[:, :1]))),
    (
        "selection",
        ValueError,
        lambda: attend(grid=vsa.Grid((4, 4, 8)), selection=OF_OTHER_TILES),
    ),
    (
        "text_valid",
        TypeError,
        lambda: attend(WITH_TEXT, WITH_TEXT, WITH_TEXT, grid=TEXT, text_valid=torch.ones(1, 2)),
    ),
    ("text_valid", ValueError, lambda: attend(text_valid=torch.ones(1, 3).bool())),
    (
        "text_valid",
        ValueError,
        lambda: attend(
            WITH_TEXT, FLAT, FLAT, grid=TEXT, kv_grid=(4, 4, 8), text_valid=torch.ones(1, 2).bool()
        ),
    ),
    ("backend", ValueError, lambda: attend(backend="fastest")),
    ("backend", ValueError, lambda: attend(backend=None)),
    ("hopper", RuntimeError, lambda: attend(backend="hopper")),
    ("emulated", RuntimeError, lambda: attend(backend="emulated")),
    ("flex", RuntimeError, lambda: attend(Q.clone().requires_grad_(), backend="flex")),
    ("must", TypeError, lambda: vsa.select(Q, Q, 1, must=torch.ones(2, 2))),
    ("must", ValueError, lambda: vsa.select(Q, Q, 1, must=torch.ones(2, 3).bool())),
    ("must", ValueError, lambda: vsa.select(Q, Q, 1, must="diagonal")),
    ("must", ValueError, lambda: vsa.select(Q, Q[:, :, :, :4], 1, kv_grid=(4, 4, 4), must="self")),
    ("mask", TypeError, lambda: vsa.Selection.from_mask(MASK.float())),
    ("mask", ValueError, lambda: vsa.Selection.from_mask(MASK[0])),
    ("mask", ValueError, lambda: vsa.Selection.from_mask(MASK, grid=vsa.Grid((4, 4, 4)))),
    ("selection", TypeError, lambda: vsa.block_sparse_attention(Q, Q, Q, None)),
    (
        "selection",
        ValueError,
        lambda: vsa.block_sparse_attention(*[Q[..., :4, :, :]] * 3, vsa.Selection.from_mask(MASK)),
    ),
    ("x", ValueError, lambda: vsa.Grid((4, 4, 8)).to_tiles(torch.ones(1, 127))),
    ("x", ValueError, lambda: vsa.Grid((4, 4, 8)).from_tiles(torch.ones(1, 3, 64))),
    ("heads", ValueError, lambda: vsa.nn.VideoSparseAttention(30, 4)),
    ("kv_heads", ValueError, lambda: vsa.nn.VideoSparseAttention(32, 4, kv_heads=3)),
    ("gates", ValueError, lambda: vsa.nn.VideoSparseAttention(32, 4, gates="fine")),
    ("topk", ValueError, lambda: vsa.nn.VideoSparseAttention(32, 4, topk=0)),
    ("x", ValueError, lambda: vsa.nn.VideoSparseAttention(32, 4)(torch.ones(1, 64, 16))),
    ("end", ValueError, lambda: vsa.SparsityRamp(start=0.1, end=0.5)),
    ("every", ValueError, lambda: vsa.SparsityRamp(every=0)),
    ("step", ValueError, lambda: vsa.SparsityRamp(step=0.0)),
    ("step", ValueError, lambda: vsa.SparsityRamp()(-1)),
    ("heads", ValueError, lambda: vsa.flops((4, 4, 4), 0, 64, 1)),
]


@pytest.mark.parametrize(
    ("name", "kind", "call"), CASES, ids=[f"{index}-{case[0]}" for index, case in enumerate(CASES)]
)
def test_bad_input_is_named_before_any_work(
    name: str, kind: type[Exception], call: Callable[[], object]
) -> None:
    with pytest.raises(kind) as caught, NoWork():
        call()
    sentence = str(caught.value)
    # A letter is a word of many sentences about something else.
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sentence)
    assert len(name) > 1 or sentence.startswith(f"{name} ")
    assert len(sentence.split()) >= 5 and "\n" not in sentence
