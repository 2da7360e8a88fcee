# SPDX-License-Identifier: Apache-2.0
"""Scores of tile means, their softmax, and the coarse attention out of them."""

from __future__ import annotations

import pytest
import torch
from kernels.machines import backend_on, machine_of, on_both
from torch import Tensor

from vsa.backends import BACKENDS, torch_coarse
from vsa.backends.kernels import coarse_select
from vsa.backends.kernels.coarse_calls import softmax_call
from vsa.operators import coarse_select as ops
from vsa.stages.coarse import coarse_attention
from vsa.values import bitmap
from vsa.values.problem import TileScores

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


def weigh(machine: str, scores: Tensor, must: Tensor | None, mass: float) -> Tensor:
    """The softmax that the kernel writes over the scores."""
    weights = scores.to(machine, copy=True)
    words = torch.empty(
        len(scores), bitmap.num_words(scores.shape[1]), dtype=torch.int32, device=machine
    )
    forced = None if must is None else bitmap.pack(must).to(machine)
    coarse_select.select_rows(
        machine_of(machine), weights, forced, [1], mass, len(scores), 0, words, weights
    )
    alone = torch.empty_like(words)
    coarse_select.select_rows(
        machine_of(machine), scores.to(machine), forced, [1], mass, len(scores), 0, alone
    )
    assert torch.equal(words, alone)
    return weights.cpu()


@on_both
@pytest.mark.parametrize("mass", [0.0, 0.8])
@pytest.mark.parametrize("columns", [1, 31, 32, 255, 256, 257, 624, 1440, 2048, 2049, 5000])
def test_weights_are_the_softmax_of_the_scores(columns: int, mass: float, machine: str) -> None:
    scores = torch.randn(5, columns) * 3
    scores[1] *= 30
    scores[2] = -7.0
    scores[3, columns // 2 :] = -torch.inf
    scores[3, 0] = 0.0
    for must in (None, torch.rand(5, columns) < 0.2):
        found, true = weigh(machine, scores, must, mass), scores.double().softmax(-1)
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=3e-7)
        assert (found.double().sum(-1) - 1).abs().max() < 3e-6


@on_both
@pytest.mark.parametrize("columns", [1, 31, 257, 2049])
def test_a_backward_finds_the_weights_of_the_forward(columns: int, machine: str) -> None:
    scores = torch.randn(6, columns) * 5
    scores[1], scores[2, 0] = -torch.inf, torch.inf
    scores[3, 0], scores[4] = torch.nan, -0.0
    again = scores.to(machine, copy=True)
    machine_of(machine).run(softmax_call(again[None]), again.device)
    found = weigh(machine, scores, None, 0.0)
    assert torch.equal(again.cpu().view(torch.int32), found.view(torch.int32))


@on_both
def test_what_is_no_number_stays_none(machine: str) -> None:
    scores = torch.randn(4, 100)
    scores[0, 3], scores[1, 4], scores[2] = torch.nan, torch.inf, torch.nan
    found = weigh(machine, scores, None, 0.0)
    assert not found[:3].sum(-1).isfinite().any()
    torch.testing.assert_close(found[3], scores[3].softmax(-1))


@on_both
@pytest.mark.parametrize("size", [1, 30000, 1 << 26], ids=["a row", "some", "all"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_the_coarse_output_comes_out_of_the_same_scores(
    heads: int, kv_heads: int, size: int, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (torch_coarse, coarse_select):
        monkeypatch.setattr(module, "SCORE_BYTES", size)
    q = torch.randn(2, heads, 40, 16, device=machine)
    k, v = torch.randn(2, 2, kv_heads, 70, 16, device=machine)
    must = torch.rand(40, 70, device=machine) < 0.1
    true = coarse_attention(q.double(), k.double(), v.double(), 0.3, "torch")
    for backend in (backend_on(machine), BACKENDS["torch"]):
        for forced, mass in ((None, 0.0), (must, 0.0), (must, 0.5)):
            scores = TileScores(q, k, forced, [9], mass, None, 0.3, backend.name)
            words, coarse = backend.select(scores, v)
            alone, nothing = backend.select(scores)
            assert torch.equal(words, alone) and nothing is None
            assert coarse is not None and coarse.is_contiguous()
            torch.testing.assert_close(coarse.double(), true, rtol=1e-5, atol=1e-6)


@on_both
def test_the_coarse_output_is_in_full_precision_whatever_the_process_allows(machine: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 100, 64, device=machine)
    scores = TileScores(q, k, None, [9], 0.0, None, 0.3, backend_on(machine).name)
    before = ops.select_and_attend(*scores, v)
    torch.set_float32_matmul_precision("medium")
    try:
        after = ops.select_and_attend(*scores, v)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
