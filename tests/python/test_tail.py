# SPDX-License-Identifier: Apache-2.0
"""``tail=True``: tiles that were not chosen enter the softmax by their means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

import vsa
from vsa.verify import reference
from vsa.verify.parity import Problem, by_name, error, expected, ours, relative_to_sdpa, worst

DOUBLE = 1e-12
GRID = vsa.Grid((5, 6, 7))
BACKENDS = ["torch", "flex", "emulated"]
flex_warns = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)


def qkv(dtype: torch.dtype = torch.float64, heads: int = 2, head_dim: int = 64) -> list[Tensor]:
    return list(torch.randn(3, 1, *GRID.shape, heads, head_dim, dtype=torch.float64).to(dtype))


def test_each_query_sees_its_tiles_and_the_means_of_the_others() -> None:
    """The definition once more, by softmax over a list of keys that is written out."""
    q, k, v = qkv(heads=1, head_dim=8)
    out, chosen, lse = vsa.attention(q, k, v, 3, tail=True, return_selection=True, return_lse=True)
    tiles = reference.tiles_of(GRID.shape, (4, 4, 4), 0)
    q, k, v, out = (x.flatten(1, 3)[0, :, 0] for x in (q, k, v, out))
    for i, j in ((0, 5), (len(tiles) - 1, 2), (3, -1)):
        token, mask = tiles[i][j], chosen.mask()[0, 0, i]
        keys, values = [], []
        for kept, members in zip(mask.tolist(), tiles, strict=True):
            # A mean counts as often as its tile has tokens: here it stands there so many times.
            times = (len(members), 1)
            keys.append(k[members] if kept else k[members].mean(0).repeat(times))
            values.append(v[members] if kept else v[members].mean(0).repeat(times))
        scores = torch.cat(keys) @ q[token] / math.sqrt(8)
        torch.testing.assert_close(out[token], scores.softmax(0) @ torch.cat(values))
        torch.testing.assert_close(lse[0, 0, token], scores.logsumexp(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["tail", "tail-gates-text", "tail-other-keys", "tail-large-logits"]
)
def test_error_is_at_most_twice_that_of_sdpa(name: str, dtype: torch.dtype) -> None:
    ratios = relative_to_sdpa(by_name(name, dtype=dtype), gradients=True)
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@flex_warns
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_chosen_leaves_no_tail(backend: str) -> None:
    q, k, v = qkv(torch.bfloat16)
    found, lse = vsa.attention(q, k, v, 1.0, tail=True, return_lse=True, backend=backend)
    exact, exact_lse = vsa.attention(q, k, v, 1.0, return_lse=True, backend=backend)
    assert torch.equal(found, exact) and torch.equal(lse, exact_lse)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_text_queries_have_no_tail(backend: str) -> None:
    grid = vsa.Grid((4, 6, 5), prefix=3, suffix=70)
    q, k, v = torch.randn(3, 2, grid.length, 2, 64).bfloat16().unbind()
    found, exact = (
        vsa.attention(q, k, v, 1, grid=grid, tail=tail, backend=backend) for tail in (True, False)
    )
    video = slice(grid.prefix, grid.prefix + grid.tokens)
    assert torch.equal(found[:, :3], exact[:, :3]) and torch.equal(found[:, -70:], exact[:, -70:])
    assert error(found[:, video], exact[:, video].double()) > 0.05


def test_gradients_match_finite_differences() -> None:
    problem = Problem(
        "differences", grid=(3, 5, 3), tile=(2, 4, 2), prefix=2, suffix=1, head_dim=3, topk=2
    )
    tensors = problem.inputs()
    names = ("q", "k", "v", "upstream")
    leaves = [tensors[name].requires_grad_() for name in names]
    grid = problem.query_grid
    selection = vsa.select(*leaves[:2], 2, grid=grid)

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
        return vsa.attention(
            q, k, v, None, grid=grid, gate_coarse=gate, gate_fine=gate, selection=selection,
            tail=True, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, Tensor]:
    """Small grids, and any choice of tiles, rows that keep none among them."""
    extent = st.integers(1, 5)
    text = draw(st.sampled_from([(0, 0), (2, 0), (1, 3)]))
    problem = Problem(
        "drawn",
        grid=(draw(extent), draw(extent), draw(extent)),
        tile=(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        batch=draw(st.integers(1, 2)),
        heads=2,
        kv_heads=draw(st.integers(1, 2)),
        head_dim=4,
        prefix=text[0],
        suffix=text[1],
        kv_grid=draw(st.none() | st.tuples(extent, extent, extent)),
        text_valid=bool(sum(text)) and draw(st.booleans()),
        magnitude=draw(st.sampled_from([1.0, 30.0])),
        tail=True,
    )
    shape = problem.batch, 2, problem.query_grid.num_tiles, problem.key_grid.num_tiles
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return problem, torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))


@given(problems())
@settings(max_examples=40, deadline=None)
def test_any_choice_is_the_reference(drawn: tuple[Problem, Tensor]) -> None:
    problem, mask = drawn
    tensors = problem.inputs()
    truth, _ = expected(problem, tensors, mask)
    grid = problem.query_grid
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    out, lse = vsa.block_sparse_attention(
        *leaves,
        vsa.Selection.from_mask(mask),
        grid=grid,
        kv_grid=problem.key_grid,
        text_valid=problem.valid(),
        tail=True,
        return_lse=True,
    )
    assert worst(out, truth.out) < DOUBLE
    torch.testing.assert_close(lse, truth.lse, rtol=1e-12, atol=1e-12)
    upstream = tensors["upstream_lse"].transpose(1, 2)
    loss = (out * tensors["upstream"]).sum()
    loss = loss + (lse.masked_fill(lse == float("-inf"), 0) * upstream).sum()
    for name, grad in zip("qkv", torch.autograd.grad(loss, leaves), strict=True):
        assert (grad - truth.grads[name]).abs().max() < 1e-10 * (
            1 + truth.grads[name].abs().max()
        ), name


@flex_warns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_that_is_taken_again_gives_the_same(backend: str) -> None:
    q, k, v = qkv(torch.bfloat16)
    out, chosen = vsa.attention(q, k, v, 3, tail=True, return_selection=True, backend=backend)
    again = vsa.attention(q, k, v, None, selection=chosen, tail=True, backend=backend)
    fine = vsa.block_sparse_attention(q, k, v, chosen, tail=True, backend=backend)
    assert torch.equal(out, again) and torch.equal(out, fine)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_the_choice_and_the_coarse_branch_are_as_without(backend: str) -> None:
    q, k, v = qkv(torch.bfloat16)
    coarse = {"gate_coarse": torch.ones(1), "gate_fine": torch.zeros(1), "backend": backend}
    out, chosen = vsa.attention(q, k, v, 3, tail=True, return_selection=True, **coarse)
    plain, same = vsa.attention(q, k, v, 3, return_selection=True, **coarse)
    assert torch.equal(chosen.bitmap, same.bitmap)
    assert error(out, plain.double()) < 2**-8


def test_a_call_with_a_tail_does_not_take_the_plan_of_one_without() -> None:
    q, k, v = qkv(torch.bfloat16)
    plain = [vsa.attention(q, k, v, 2, backend="emulated") for _ in range(2)]
    found = vsa.attention(q, k, v, 2, tail=True, backend="emulated")
    exact = vsa.attention(*(x.double() for x in (q, k, v)), 2, tail=True)
    assert torch.equal(*plain) and error(found, exact) < 0.005 < error(plain[0], exact)
    with pytest.raises(TypeError, match=r"^tail must be True or False, but it is None"):
        vsa.attention(q, k, v, 2, tail=None, backend="emulated")


@pytest.mark.parametrize("name", ["tail-large-logits", "tail-gates-text"])
def test_strided_views_give_the_bits_of_copies(name: str) -> None:
    problem = by_name(name, dtype=torch.bfloat16, head_dim=64)
    tensors = problem.inputs()
    strided = {
        name: torch.stack((x, x + 1), dim=2)[:, :, 0] if x.ndim == 4 else x
        for name, x in tensors.items()
    }
    assert not strided["q"].is_contiguous()
    for backend in ("torch", "emulated"):
        (a, _), (b, _) = (ours(problem, x, backend=backend) for x in (tensors, strided))
        assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)
        assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_text_that_is_not_real_reaches_nothing(backend: str) -> None:
    grid = vsa.Grid((4, 5, 6), prefix=3, suffix=2)
    valid = torch.tensor([[True, False, True, True, False]])
    q, k, v = torch.randn(3, 1, grid.length, 2, 64).bfloat16().unbind()
    hidden = [1, grid.length - 1]
    results = []
    for fill in (0.0, float("nan")):
        leaves = [x.clone().index_fill_(1, torch.tensor(hidden), fill) for x in (q, k, v)]
        leaves = [x.requires_grad_() for x in leaves]
        out = vsa.attention(*leaves, 1, grid=grid, text_valid=valid, tail=True, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and clean[:, hidden].abs().max() == 0


def test_forward_tangents_are_right() -> None:
    q, k, v = qkv(heads=1, head_dim=8)
    tangent = torch.randn_like(q)

    def call(name: str, x: Tensor) -> Tensor:
        inputs = {"q": q, "k": k, "v": v, name: x}
        out, lse = vsa.attention(**inputs, topk=3, tail=True, return_lse=True)
        return torch.cat((out.flatten(), lse.flatten()))

    for name, start in (("q", q), ("k", k), ("v", v)):
        _, found = jvp(lambda x, name=name: call(name, x), (start,), (tangent,))
        step = 1e-6
        slope = (call(name, start + step * tangent) - call(name, start - step * tangent)) / 2e-6
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_compiled_calls_are_eager_ones(backend: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return vsa.attention(
            q, k, v, 3, gate_coarse=gate, tail=True, return_lse=True, backend=backend
        )

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    inputs = [*qkv(torch.bfloat16), torch.randn(*GRID.shape, 2, 64).bfloat16()]
    for call in (run, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = call(*leaves)
        results.append([out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)


def test_second_derivatives_are_refused() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    out = vsa.attention(*leaves, 2, tail=True)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), leaves)


def test_autocast_computes_in_its_type() -> None:
    q, k, v = qkv(torch.float32)
    chosen = vsa.select(q, k, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = vsa.block_sparse_attention(q, k, v, chosen, tail=True)
    low = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(found, vsa.block_sparse_attention(*low, chosen, tail=True))


def test_a_layer_with_a_tail() -> None:
    layer = vsa.nn.VideoSparseAttention(64, 2, 3, tail=True)
    x = torch.randn(1, *GRID.shape, 64)
    found = layer(x)
    assert "tail=True" in repr(layer) and "tail" not in repr(vsa.nn.VideoSparseAttention(64, 2, 3))
    layer.tail = False
    assert error(found, layer(x).double()) > 1e-3
    layer.tail, layer.topk = True, 1.0
    dense = layer(x)
    layer.tail = False
    torch.testing.assert_close(dense, layer(x))


@pytest.mark.parametrize("backward", [False, True])
def test_operations_of_the_tail(backward: bool) -> None:
    grid = vsa.Grid((4, 6, 9), prefix=3)
    count = {"backward": backward, "batch": 2}
    plain = vsa.flops(grid, 2, 64, 2, **count)
    wanted = vsa.flops(grid, 2, 64, 2, tail=True, **count)
    products = (2 + 5 * backward) * 2  # a multiply-add is two
    assert wanted.tail == products * 2 * 2 * 64 * grid.tokens * (grid.num_tiles - 2)
    assert plain.tail == 0 and wanted.sparse == plain.sparse + wanted.tail
    assert list(wanted.stages) == ["coarse", "select", "fine", "tail", "combine"]
    leaves = [torch.randn(2, grid.length, 2, 64).bfloat16().requires_grad_() for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        out = vsa.attention(*leaves, 2, grid=grid, tail=True)
        if backward:
            out.sum().backward()
    found = counter.get_total_flops()
    assert found == pytest.approx(wanted.select + wanted.fine + wanted.tail, abs=1)
