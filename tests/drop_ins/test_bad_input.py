# SPDX-License-Identifier: Apache-2.0
"""Bad input to the drop-ins: one sentence that names the argument, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drop_ins.padded import Call, numbers

import vsa

CALL = Call((64, 17), kv_sizes=(64, 3, 9), heads=4, kv_heads=2, batch=2, weight=None)
SIZES = {"variable_block_sizes": numbers(CALL.of_keys)}
WHOLE = SIZES | {"q_variable_block_sizes": numbers(CALL.sizes), "topk": 2}


def tensors() -> dict[str, Any]:
    return {name: x for name, x in CALL.tensors(fill=0.0).items() if name in "qkv"}


def lists(index: int = 2, count: int = 2) -> dict[str, Any]:
    q2k_idx = torch.zeros(2, 4, 2, 2, dtype=torch.int32)
    q2k_num = torch.full((2, 4, 2), 1, dtype=torch.int32)
    q2k_idx[1, 3, 1, 1], q2k_num[1, 3, 1] = index, count
    return {"q2k_idx": q2k_idx, "q2k_num": q2k_num}


KEPT = {"block_map": torch.ones(2, 4, 2, 3, dtype=torch.bool)}
FINE = SIZES | KEPT
LISTS = SIZES | lists()
whole, by_map, by_lists = (
    vsa.video_sparse_attn,
    vsa.block_sparse_attn,
    vsa.block_sparse_attn_from_indices,
)
short = torch.randn(2, 4, 100, 16, dtype=torch.float64)
WRONG: dict[str, tuple[Callable, dict, dict, type[Exception], str]] = {
    "size above a tile": (
        whole, WHOLE, {"variable_block_sizes": numbers((64, 65, 1))}, ValueError,
        "variable_block_sizes must hold numbers of tokens from 0 to 64, but it holds 65"),
    "size below 0": (
        whole, WHOLE, {"q_variable_block_sizes": numbers((64, -1))}, ValueError,
        "q_variable_block_sizes must hold numbers of tokens from 0 to 64, but it holds -1"),
    "too few sizes": (
        whole, WHOLE, {"variable_block_sizes": numbers((64, 6))}, ValueError,
        "variable_block_sizes must have one number for each of the 3 tiles of k"),
    "sizes of floats": (
        whole, WHOLE, {"variable_block_sizes": torch.ones(3)}, TypeError,
        "variable_block_sizes must be a tensor of integers, but it is torch.float32"),
    "sizes in a list": (
        whole, WHOLE, {"variable_block_sizes": [64, 3, 9]}, TypeError,
        "variable_block_sizes must be a tensor of integers, but it is a list"),
    "sizes elsewhere": (
        whole, WHOLE, {"variable_block_sizes": numbers((1, 2, 3)).to("meta")}, ValueError,
        "variable_block_sizes must share the device of q"),
    "a length that is no multiple": (
        whole, WHOLE, {"q": short}, ValueError,
        "q must have a multiple of 64 slots, those of a tile, in its sequence, but it has 100"),
    "heads and slots the other way round": (
        whole, WHOLE, {"q": torch.randn(2, 128, 4, 16).double()}, ValueError,
        r".* but it has 4, as it is \(B, heads, S, head_dim\) = \(2, 128, 4, 16\)$"),
    "sizes for each video of a batch": (
        whole, WHOLE, {"variable_block_sizes": numbers((64, 3, 9)).expand(2, 3)}, ValueError,
        r".* but its shape is \(2, 3\): all videos of a batch share them$"),
    "no topk": (whole, WHOLE, {"topk": None}, TypeError, "topk must say how many key tiles"),
    "topk of 0": (whole, WHOLE, {"topk": 0}, ValueError, "topk must be at least 1"),
    "a block of 32": (
        whole, WHOLE, {"block_size": (4, 4, 2)}, ValueError,
        r"block_size must be 64, 128 or 256 slots, or three sides \(t, h, w\) of as many"),
    "a block of two sides": (
        whole, WHOLE, {"block_size": (8, 8)}, TypeError, "block_size must be three token counts"),
    "a weight that does not broadcast": (
        whole, WHOLE, {"compress_attn_weight": torch.ones(2, 4, 5, 16)}, ValueError,
        "compress_attn_weight must be broadcastable to q"),
    "three axes": (
        whole, WHOLE, {"q": short[0]}, ValueError,
        r"q must be \(B, heads, S, head_dim\), but its shape is \(4, 100, 16\)"),
    "heads that do not divide": (
        whole, WHOLE, {name: torch.ones(2, 3, 192, 16).double() for name in "kv"}, ValueError,
        "k must have a number of heads that divides the heads of q, but k has 3 and q has 4"),
    "another head_dim": (
        by_map, FINE, {name: torch.ones(2, 2, 192, 8).double() for name in "kv"}, ValueError,
        r"k must have the batch and head_dim of q, but k is \(2, 2, 192, 8\)"),
    "v unlike k": (
        by_map, FINE, {"v": torch.ones(2, 2, 128, 16).double()}, ValueError,
        r"v must have the shape of k, but v is \(2, 2, 128, 16\)"),
    "another type": (
        by_map, FINE, {"k": torch.ones(2, 2, 192, 16)}, TypeError,
        "k must share the dtype of q"),
    "q in a list": (by_map, FINE, {"q": [1.0]}, TypeError, "q must be a torch.Tensor"),
    "validate as a word": (
        by_map, FINE, {"validate": "yes"}, TypeError, "validate must be True or False"),
    "a map of numbers": (
        by_map, FINE, {"block_map": torch.ones(2, 4, 2, 3)}, TypeError,
        "block_map must be a bool tensor, but it is torch.float32"),
    "a map of another shape": (
        by_map, FINE, {"block_map": KEPT["block_map"][..., :2]}, ValueError,
        r"block_map must be \(B, heads, n_q, n_k\) = \(2, 4, 2, 3\), but its shape is"),
    "a map without heads": (
        by_map, FINE, {"block_map": KEPT["block_map"][0]}, ValueError,
        r"block_map must be \(B, heads, n_q, n_k\) = \(2, 4, 2, 3\), but its shape is"),
    "a map of tiles of 43 slots": (
        by_map, FINE, {"block_map": torch.ones(2, 4, 3, 3, dtype=torch.bool)}, ValueError,
        "block_map speaks of 3 tiles of q, which must have 64, 128 or 256 slots each"),
    "an index out of range": (
        by_lists, LISTS, lists(index=3), ValueError,
        "q2k_idx must hold key tiles from 0 to 2 in the first q2k_num of a row, but it holds 3"),
    "an index below 0": (
        by_lists, LISTS, lists(index=-1), ValueError,
        "q2k_idx must hold key tiles from 0 to 2 .*, but it holds -1"),
    "a count above the width": (
        by_lists, LISTS, lists(count=3), ValueError,
        "q2k_num must hold counts from 0 to 2, the width of q2k_idx, but it holds 3"),
    "a count below 0": (
        by_lists, LISTS, lists(count=-2), ValueError, "q2k_num must hold counts .* holds -2"),
    "lists of another shape": (
        by_lists, LISTS, {"q2k_idx": lists()["q2k_idx"][:1]}, ValueError,
        r"q2k_idx must be \(B, heads, n_q, width\) with \(B, heads, n_q\) = \(2, 4, 2\)"),
    "counts of another shape": (
        by_lists, LISTS, {"q2k_num": lists()["q2k_num"][0]}, ValueError,
        r"q2k_num must be \(B, heads, n_q\) = \(2, 4, 2\), but its shape is \(4, 2\)"),
    "lists of floats": (
        by_lists, LISTS, {"q2k_idx": lists()["q2k_idx"].double()}, TypeError,
        "q2k_idx must be a tensor of integers, but it is torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, right, wrong, kind, sentence = WRONG[name]
    given = tensors() | right | wrong
    for operator in ("padded_attention", "padded_gated_attention", "padded_tile_means"):
        monkeypatch.setattr(f"vsa.operators.padded.{operator}", None)  # none of them is called
    with pytest.raises(kind, match="^" + sentence) as found:
        function(**given)
    assert str(found.value).count(". ") == 0 and len(str(found.value).split()) >= 5


@pytest.mark.parametrize("function, right", [(whole, WHOLE), (by_map, FINE), (by_lists, LISTS)])
def test_what_is_right_is_taken(function: Callable, right: dict) -> None:
    """Else any sentence would do."""
    found = function(**tensors() | right)
    out = found if isinstance(found, torch.Tensor) else found[0]
    assert out.shape == tensors()["q"].shape and out.isfinite().all()


def test_what_stands_after_a_count_is_not_read() -> None:
    """As where lists are filled up with -1, or never written."""
    several = tensors() | SIZES
    right = by_lists(**several, **lists(index=0, count=1))[0]
    assert torch.equal(right, by_lists(**several, **lists(index=-1, count=1))[0])
    assert torch.equal(right, by_lists(**several, **lists(index=1 << 30, count=1))[0])


def test_a_tile_named_twice_counts_once() -> None:
    several = tensors() | SIZES
    once, twice = lists(index=0, count=1), lists(index=0, count=2)
    assert torch.equal(by_lists(**several, **once)[0], by_lists(**several, **twice)[0])


def test_compiled_code_asks_the_device() -> None:
    """Numbers are not known while code is traced; a wrong one stops the run with the sentence."""
    compiled = torch.compile(by_lists, backend="aot_eager", fullgraph=True)
    several = tensors() | SIZES
    torch.testing.assert_close(compiled(**several, **lists()), by_lists(**several, **lists()))
    with pytest.raises(RuntimeError, match="q2k_idx must hold key tiles from 0 to 2"):
        compiled(**several, **lists(index=3))


def test_an_unavailable_backend_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'emulated' cannot run here: the kernels take"):
        whole(**tensors() | WHOLE, backend="emulated")
