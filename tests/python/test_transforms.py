# SPDX-License-Identifier: Apache-2.0
"""What autograd offers beyond one backward pass: right, or one sentence, never a silent zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vsa

Q, K, V, GATE, TANGENT = torch.randn(5, 1, 3, 5, 6, 2, 16, dtype=torch.float64).unbind()
TEXT = vsa.Grid((3, 5, 6), prefix=2, suffix=3)
VALID = torch.tensor([[True, False, True, False, True]])


def attend(topk: object = 2, **changes: torch.Tensor) -> torch.Tensor:
    given = {"q": Q, "k": K, "v": V, "gate_coarse": GATE, "gate_fine": GATE.cos(), **changes}
    return vsa.attention(topk=topk, **given)


def with_text(**changes: torch.Tensor) -> torch.Tensor:
    """Grouped heads, text that is partly valid, and what return_lse gives."""
    numbers = torch.arange(3 * TEXT.length * 64, dtype=torch.float64).mul(12.9898).sin()
    q, k, v = numbers.view(3, 1, TEXT.length, 4, 16).unbind()
    given = {"q": q, "k": k[:, :, :2], "v": v[:, :, :2]}
    given.update({name: given[name] + x for name, x in changes.items()})
    out, lse = vsa.attention(**given, topk=2, grid=TEXT, text_valid=VALID, return_lse=True)
    return torch.cat((out.flatten(), lse[lse.isfinite()]))


def slope(call: Callable, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """By central differences: the oracle."""
    step = 1e-6
    return (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)


@pytest.mark.parametrize("name", ["q", "k", "v", "gate_coarse", "gate_fine"])
def test_forward_tangents_are_right(name: str) -> None:
    start = {"q": Q, "k": K, "v": V, "gate_coarse": GATE, "gate_fine": GATE.cos()}[name]

    def call(x: torch.Tensor) -> torch.Tensor:
        return attend(**{name: x})

    expected = slope(call, start, TANGENT)
    out, found = jvp(call, (start,), (TANGENT,))
    torch.testing.assert_close(out, call(start))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(start, TANGENT))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)
    assert found.norm() > 0.1


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_forward_tangents_with_text_and_grouped_heads(name: str) -> None:
    shape = (1, TEXT.length, 4 if name == "q" else 2, 16)
    zero, tangent = torch.zeros(shape).double(), torch.randn(shape).double()

    def call(x: torch.Tensor) -> torch.Tensor:
        return with_text(**{name: x})

    _, found = jvp(call, (zero,), (tangent,))
    torch.testing.assert_close(found, slope(call, zero, tangent), rtol=1e-5, atol=1e-7)


def test_dense_tangents_equal_those_of_sdpa() -> None:
    def dense(q: torch.Tensor) -> torch.Tensor:
        rows = (x.flatten(1, 3).transpose(1, 2) for x in (q, K, V))
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(*rows).transpose(1, 2).view(q.shape)

    _, expected = jvp(dense, (Q,), (TANGENT,))
    _, found = jvp(lambda q: vsa.attention(q, K, V, 1.0), (Q,), (TANGENT,))
    torch.testing.assert_close(found, expected)


def test_gradients_by_torch_func_and_of_gradients() -> None:
    def loss(q: torch.Tensor) -> torch.Tensor:
        return attend(q=q).square().sum()

    leaf = Q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(Q), expected)
    _, curvature = jvp(grad(loss), (Q,), (TANGENT,))  # forward over reverse

    def gradient(q: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss(q.requires_grad_()), q)[0]

    torch.testing.assert_close(curvature, slope(gradient, Q.clone(), TANGENT), rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_inside() -> None:
    selection = vsa.select(Q, K, 2)
    q, k, v, tangent = (x.float() for x in (Q, K, V, TANGENT))

    def call(q: torch.Tensor) -> torch.Tensor:
        return vsa.block_sparse_attention(q, k, v, selection, return_lse=True)[1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, found = jvp(call, (q,), (tangent,))
        plain = call(q)
    rounded = [x.bfloat16().double() for x in (q, k, v)]
    exact = vsa.block_sparse_attention(*rounded, selection, return_lse=True)[1]
    for lse in (out, plain):  # in fp32 from what autocast makes of the inputs
        torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.norm() > 0.1


def test_the_choice_is_that_of_plain_tensors() -> None:
    expected = vsa.select(Q, K, 2).bitmap
    found = []

    def call(q: torch.Tensor) -> torch.Tensor:
        out, selection = vsa.attention(q, K, V, 2, return_selection=True)
        found.extend([selection.bitmap, vsa.select(q, K, 2).bitmap])
        return vsa.block_sparse_attention(q, K, V, selection) - out

    _, tangent = jvp(call, (Q,), (TANGENT,))
    assert tangent.abs().max() < 1e-12
    assert len(found) == 2 and all(torch.equal(bitmap, expected) for bitmap in found)


@pytest.mark.parametrize(("name", "at"), [("q", Q), ("k", K), ("v", V), ("gate_coarse", GATE)])
def test_hidden_axes_are_refused(name: str, at: torch.Tensor) -> None:
    for transform in (vmap, lambda call: vmap(grad(lambda x: call(x).sum()))):
        with pytest.raises(NotImplementedError, match=rf"^{name} is inside of torch\.func\.vmap"):
            transform(lambda x: attend(**{name: x}))(torch.stack([at, at]))


@pytest.mark.parametrize("backend", ["emulated", "flex"])
def test_tangents_are_refused_where_they_would_be_lost(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 4, 4, 4, 1, 64).bfloat16().unbind()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=rf"^k has a forward-mode tangent .* {backend!r}$"),
    ):
        vsa.attention(q, forward_ad.make_dual(k, v), v, 1, backend=backend)


def test_meta_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q must hold numbers, but it is on the meta device"):
        attend(q=Q.to("meta"))


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
        vsa.attention(x, x, x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vsa.attention(x, x, x, 2)  # once
        vsa.attention(x, x, x, 2, tile="auto")
        chosen = vsa.Grid((1, 1, 640), tile=(1, 1, 8))
        vsa.attention(*[x.flatten(1, 3)] * 3, 2, grid=chosen)
        y = torch.randn(1, 5, 6, 7, 1, 16)
        vsa.attention(y, y, y, 1)


def test_keys_that_do_not_fit_their_grid_name_it() -> None:
    q = torch.randn(1, 128, 2, 16)
    with pytest.raises(ValueError, match=r"^k has 128 tokens in its sequence, but kv_grid has"):
        vsa.attention(q, q, q, 1, grid=(4, 4, 8), kv_grid=(4, 4, 4))
