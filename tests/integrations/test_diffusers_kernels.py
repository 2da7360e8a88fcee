# SPDX-License-Identifier: Apache-2.0
"""Transformers of diffusers through our own kernels: on a GPU, or else the same on the emulator.

Other tests of a family run PyTorch's attention, in fp32 and with heads of 24 channels. Here heads
have 64 channels and everything is fp16, so that strides, text, masks and layouts of each family
reach the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from integrations import tiny_base, tiny_newer, tiny_transformers
from integrations.tiny_transformers import UNLIKE, easyanimate, run

from vsa import backends
from vsa.backends.base import Request
from vsa.integrations.diffusers import apply_vsa, remove_vsa

DEVICE, KERNELS = ("cuda", "hopper") if torch.cuda.is_available() else ("cpu", "emulated")
FAMILIES = [family for family in UNLIKE if family is not easyanimate]  # its heads have 32 channels
OPTIONS: dict[str, Any] = {"topk": 2, "tile": (2, 3, 4)}


def as_there(x: Any) -> Any:
    """An input where and as the model is; whole numbers and fp64 positions stay what they are."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(as_there, x))
    if not isinstance(x, Tensor):
        return x
    return x.to(DEVICE, torch.float16 if x.dtype == torch.float32 else x.dtype)


def loaded(model: nn.Module) -> nn.Module:
    """As ``from_pretrained`` would load it in fp16: some of its parts stay in fp32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    model.to(DEVICE)
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.half()
    return model


@pytest.fixture
def computed_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what computes 16-bit attention that names no backend, and heads of 64 channels."""
    for module in (tiny_base, tiny_newer, tiny_transformers):
        monkeypatch.setattr(module, "HEAD_DIM", 64)

    def compute_by(name: str) -> None:
        def automatic(request: Request) -> str:
            assert request.dtype == "torch.float16", f"attention of {request.dtype}"
            return name

        monkeypatch.setattr(backends, "_automatic", automatic)

    return compute_by


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@torch.no_grad()
def test_kernels_give_what_pytorch_gives(family: Any, computed_by: Callable[[str], None]) -> None:
    model, inputs = family()
    model, inputs = loaded(model), {name: as_there(x) for name, x in inputs.items()}
    outs = {}
    for name in ("torch", KERNELS):
        computed_by(name)
        apply_vsa(model, **OPTIONS)
        outs[name] = run(model, inputs).double()
        remove_vsa(model)
    dense = run(model, inputs).double()
    norm = dense.norm()
    assert norm.isfinite()
    off, sparse = ((outs["torch"] - x).norm() / norm for x in (outs[KERNELS], dense))
    # What is left is rounding; to compute other tiles, or other tokens, is ten times as much.
    assert off < 0.1 * sparse
