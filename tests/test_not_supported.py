# SPDX-License-Identifier: Apache-2.0
"""What autograd offers beyond one backward pass: right, or one sentence, never a silent zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import vsa

Q, K, V = torch.randn(3, 1, 2, 4, 4, 2, 16, dtype=torch.float64).unbind()


def attend(q: torch.Tensor) -> torch.Tensor:
    return vsa.attention(q, K, V, 0.5)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jvp(f, (Q,), (Q,)),
        lambda f: grad(lambda q: f(q).sum())(Q),
        lambda f: vmap(f)(torch.stack([Q, Q])),
        lambda f: jacrev(f)(Q),
    ],
    ids=["jvp", "grad", "vmap", "jacrev"],
)
@pytest.mark.parametrize("name", ["q", "k", "v", "gate_coarse", "gate_fine"])
def test_transforms_are_refused_whatever_they_reach(transform: Callable, name: str) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return vsa.attention(**{"q": Q, "k": K, "v": V, name: x}, topk=0.5)

    with pytest.raises(NotImplementedError, match=rf"^{name} is inside of a transform of torch"):
        transform(call)


@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_a_forward_tangent_is_refused(backend: str) -> None:
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"^k has a forward-mode tangent"),
    ):
        vsa.attention(Q, forward_ad.make_dual(K, V), V, 0.5, backend=backend)


def test_meta_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q must hold numbers, but it is on the meta device"):
        attend(Q.to("meta"))


@pytest.mark.parametrize("backend", ["torch", "emulated"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_second_derivative_is_refused(backend: str, gated: bool) -> None:
    dtype, head_dim = (torch.float64, 16) if backend == "torch" else (torch.bfloat16, 64)
    q, k, v, gate = torch.randn(4, 1, 2, 4, 4, 1, head_dim, dtype=dtype).unbind()
    q.requires_grad_()
    out = vsa.attention(q, k, v, 0.5, gate_fine=gate if gated else None, backend=backend)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.square().sum().backward()


@pytest.mark.parametrize("gated", [False, True])
def test_what_was_made_in_inference_mode_can_be_used_in_training(gated: bool) -> None:
    grid = vsa.Grid((2, 4, 4), suffix=3)
    q, k, v, gate = torch.randn(4, 1, grid.length, 2, 16, dtype=torch.float64).unbind()
    with torch.inference_mode():
        selection = vsa.select(q.clone(), k.clone(), 1, grid=grid)
        valid = torch.tensor([[True, False, True]])
    normal = vsa.select(q, k, 1, grid=grid)
    found = []
    for chosen, real in ((selection, valid), (normal, torch.tensor([[True, False, True]]))):
        leaf = q.clone().requires_grad_()
        out = vsa.attention(
            leaf, k, v, None, grid=grid, selection=chosen, text_valid=real,
            gate_coarse=gate if gated else None,
        )  # fmt: skip
        found.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*found)


def test_thin_videos_are_told_of_tiles_that_fit() -> None:
    x = torch.randn(1, 1, 1, 640, 1, 16)
    with pytest.warns(UserWarning, match=r"holds 4 of 64 tokens .* takes \(1, 1, 64\)"):
        vsa.attention(x, x, x, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vsa.attention(x, x, x, 1)  # once
        vsa.attention(x, x, x, 1, tile="auto")
        y = torch.randn(1, 5, 6, 7, 1, 16)
        vsa.attention(y, y, y, 1)


def test_keys_that_do_not_fit_their_grid_name_it() -> None:
    q = torch.randn(1, 128, 2, 16)
    with pytest.raises(ValueError, match=r"^k has 128 tokens in its sequence, but kv_grid has"):
        vsa.attention(q, q, q, 1, grid=(4, 4, 8), kv_grid=(4, 4, 4))
