# SPDX-License-Identifier: Apache-2.0
"""bench/fp8_sums.py on the sums that an H200 gave: one model explains them, no other does."""

from __future__ import annotations

import gzip

import torch

import fp8_sums
from fp8_sums import TESTS, Model, Recorded, kinds, sums


def kept() -> dict[str, Recorded]:
    with gzip.open(TESTS / "kernels" / "fp8_sums_h200.pt.gz") as file:
        return {name: Recorded(**of) for name, of in torch.load(file, weights_only=True).items()}


def test_one_model_explains_all_recorded_sums():
    right = Model("sum", 13, 13)
    assert right in fp8_sums.MODELS
    for model in fp8_sums.MODELS:
        wrong = [not torch.equal(sums(of, model), of.found.double()) for of in kept().values()]
        assert any(wrong) == (model != right), model


def test_inputs_are_the_same_every_time():
    assert [name for name, _ in kinds(1)] == list(kept())
    for (name, first), (_, again) in zip(kinds(2), kinds(2), strict=True):
        assert all(map(torch.equal, first[:3], again[:3])), name
