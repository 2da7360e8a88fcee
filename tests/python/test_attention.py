# SPDX-License-Identifier: Apache-2.0
"""``vsa.attention`` against the fp64 reference, and the consequences of its definition."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.verify import dense, reference
from vsa.verify.parity import (
    PROBLEMS,
    Problem,
    Result,
    by_name,
    expected,
    ours,
    relative_to_sdpa,
    worst,
)

DOUBLE = 1e-12


@functools.cache
def by_definition(problem: Problem) -> tuple[Result, Tensor]:
    """The reference's results for the problem's inputs; its loops take most of these tests."""
    return expected(problem, problem.inputs())


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_attention_is_the_reference(problem: Problem) -> None:
    tensors = problem.inputs()
    result, selection = ours(problem, tensors)
    truth, mask = by_definition(problem)
    assert torch.equal(selection.mask(), mask)
    assert worst(result.out, truth.out) < DOUBLE
    assert torch.allclose(result.lse, truth.lse, rtol=1e-12, atol=1e-12)
    for name, grad in truth.grads.items():
        assert worst(result.grads[name], grad) < 10 * DOUBLE, name


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_dense_attention_under_a_mask_is_the_reference(problem: Problem) -> None:
    tensors = problem.inputs()
    truth, mask = by_definition(problem)
    found, chosen = expected(problem, tensors, oracle=dense.attention)
    assert torch.equal(chosen, mask) and worst(found.out, truth.out) < DOUBLE
    assert torch.allclose(found.lse, truth.lse, rtol=1e-13, atol=1e-13)
    for name, grad in truth.grads.items():
        assert worst(found.grads[name], grad) < DOUBLE, name


def test_a_mask_with_empty_rows_is_the_same_in_both() -> None:
    problem = by_name("text")
    tensors = problem.inputs()
    _, mask = expected(problem, tensors)
    mask[:, :, 0] = False
    mask[1] = False
    (truth, _), (found, _) = (
        expected(problem, tensors, mask, oracle)
        for oracle in (reference.attention, dense.attention)
    )
    assert worst(found.out, truth.out) < DOUBLE and torch.allclose(found.lse, truth.lse)
    for name, grad in truth.grads.items():
        assert worst(found.grads[name], grad) < DOUBLE, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["ragged", "share", "tiny-tile", "text", "other-keys", "large-logits", "grouped-query"]
)
def test_error_is_at_most_twice_that_of_sdpa(name: str, dtype: torch.dtype) -> None:
    ratios = relative_to_sdpa(by_name(name, dtype=dtype), gradients=True)
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def test_everything_selected_is_dense_attention() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 6, 4, 32, dtype=torch.float64)
    dense = functional.scaled_dot_product_attention(
        *(x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
    )
    dense = dense.transpose(1, 2).view(q.shape)
    assert worst(vsa.attention(q, k, v, 1.0), dense) < DOUBLE
    assert worst(vsa.attention(q, k, v, 10**6), dense) < DOUBLE


def test_a_zero_coarse_gate_gives_exactly_the_fine_output() -> None:
    q, k, v = torch.randn(3, 2, 5, 6, 7, 4, 16)
    zero = torch.zeros(1, requires_grad=True)
    gated = vsa.attention(q, k, v, 3, gate_coarse=zero)
    assert torch.equal(gated, vsa.attention(q, k, v, 3))
    gated.sum().backward()
    assert zero.grad.abs().item() > 0


def test_the_coarse_branch_reaches_q_k_and_v_through_its_softmax() -> None:
    q, k, v = (
        x.requires_grad_() for x in torch.randn(3, 1, 5, 6, 7, 2, 16, dtype=torch.float64).unbind()
    )
    gate = torch.ones(1, dtype=torch.float64)
    with_coarse = torch.autograd.grad(vsa.attention(q, k, v, 2, gate_coarse=gate).sum(), (q, k, v))
    without = torch.autograd.grad(vsa.attention(q, k, v, 2).sum(), (q, k, v))
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(with_coarse, without, strict=True))


def test_gradients_match_finite_differences() -> None:
    problem = Problem(
        "differences", grid=(3, 5, 3), tile=(2, 4, 2), prefix=2, suffix=1, head_dim=3, topk=2
    )
    tensors = problem.inputs()
    call = {"topk": 2, "grid": problem.query_grid}
    selection = vsa.attention(
        tensors["q"], tensors["k"], tensors["v"], **call, return_selection=True
    )[1]
    leaves = [tensors[name].requires_grad_() for name in "qkv"] + [
        tensors["upstream"].requires_grad_()
    ]

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return vsa.attention(
            q, k, v, **call, gate_coarse=gate, gate_fine=gate, selection=selection, return_lse=True
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_video_shape_and_flat_shape_agree_bit_for_bit() -> None:
    q, k, v, gate = torch.randn(4, 2, 5, 6, 7, 4, 16)
    flat = [x.flatten(1, 3) for x in (q, k, v, gate)]
    video = vsa.attention(q, k, v, 3, gate_coarse=gate, gate_fine=gate[..., :1])
    again = vsa.attention(
        *flat[:3], 3, grid=(5, 6, 7), gate_coarse=flat[3], gate_fine=flat[3][..., :1]
    )
    assert video.shape == q.shape
    assert torch.equal(video.flatten(1, 3), again)


@pytest.mark.parametrize("layout", ["fused-qkv", "heads-first", "sliced", "batch-expanded"])
def test_strided_views_give_the_bits_of_copies(layout: str) -> None:
    length = 5 * 6 * 7
    if layout == "fused-qkv":
        views = torch.randn(2, length, 3, 4, 16).unbind(2)
    elif layout == "heads-first":
        views = [x.transpose(1, 2) for x in torch.randn(3, 2, 4, length, 16)]
    elif layout == "sliced":
        views = [x[:, 3:-2, ::2] for x in torch.randn(3, 2, length + 5, 8, 16)]
    else:
        views = [x.expand(2, -1, -1, -1) for x in torch.randn(3, 1, length, 4, 16)]
    leaves = [
        [x.detach().clone(memory_format=torch.contiguous_format) for x in views],
        [x.detach() for x in views],
    ]
    results = []
    for triple in leaves:
        triple = [x.requires_grad_() for x in triple]
        out = vsa.attention(*triple, 3, grid=(5, 6, 7))
        results.append([out, *torch.autograd.grad(out.square().sum(), triple)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_same_inputs_give_the_same_bits() -> None:
    problem = by_name("text", dtype=torch.float32)
    runs = [ours(problem, problem.inputs())[0] for _ in range(3)]
    for again in runs[1:]:
        assert torch.equal(runs[0].out, again.out)
        assert all(torch.equal(runs[0].grads[name], again.grads[name]) for name in again.grads)


def test_unselected_tiles_and_invalid_text_never_reach_the_output() -> None:
    grid = vsa.Grid((4, 8, 8), prefix=3, suffix=2)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, grid.length, 2, 16).unbind())
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    valid = torch.tensor([[True, False, True, True, False]])
    poison = torch.zeros(grid.length, dtype=torch.bool)
    poison[[1, grid.length - 1]] = True
    poison[3 : 3 + grid.tokens] = grid.tile_of_token() >= 2
    selection = vsa.Selection.from_mask(mask)
    clean = vsa.block_sparse_attention(q, k, v, selection, grid=grid, text_valid=valid)
    with torch.no_grad():
        bad_k, bad_v = (x.masked_fill(poison[:, None, None], float("nan")) for x in (k, v))
    # Text queries attend every tile, so only the video's output can be free of the poison.
    video = slice(3, 3 + grid.tokens)
    dirty = vsa.block_sparse_attention(q, bad_k, bad_v, selection, grid=grid, text_valid=valid)
    assert torch.equal(clean[:, video], dirty[:, video])
    assert clean[:, [1, -1]].abs().max() == 0
    grads = torch.autograd.grad(clean.sum(), (q, k, v))
    assert all(x[:, [1, -1]].abs().max() == 0 for x in grads)


def test_rows_without_any_tile_are_zero_with_lse_minus_infinity() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 4, 4, 8, 1, 16).unbind())
    mask = torch.tensor([[[[True, False], [False, False]]]])
    out, lse = vsa.block_sparse_attention(q, k, v, vsa.Selection.from_mask(mask), return_lse=True)
    assert out[..., 4:, :, :].abs().max() == 0 and out[..., :4, :, :].abs().min() > 0
    assert (lse.view(4, 4, 8)[..., 4:] == float("-inf")).all() and lse.view(4, 4, 8)[
        ..., :4
    ].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)
    assert grads[0][..., 4:, :, :].abs().max() == 0


def test_reusing_a_selection_skips_the_choice() -> None:
    q, k, v = torch.randn(3, 2, 5, 6, 7, 2, 16)
    out, selection, lse = vsa.attention(q, k, v, 3, return_selection=True, return_lse=True)
    again, same = vsa.attention(q, k, v, None, selection=selection, return_selection=True)
    assert torch.equal(out, again) and same is selection
    assert lse.shape == (2, 2, 210) and lse.dtype == torch.float32
    other = vsa.attention(-q, k, v, 3, selection=selection)
    assert torch.equal(other, vsa.block_sparse_attention(-q, k, v, selection))


def test_merging_two_halves_by_their_lse_is_dense_attention() -> None:
    """What a caller does across chunks: LSE is exact, natural and differentiable."""
    q, k, v = (
        x.requires_grad_() for x in torch.randn(3, 1, 4, 8, 8, 2, 16, dtype=torch.float64).unbind()
    )
    mask = torch.rand(1, 2, 4, 4) < 0.5
    mask[..., 0, :] = True
    mask[..., 1, 0] = True
    (a, lse_a), (b, lse_b) = (
        vsa.block_sparse_attention(q, k, v, vsa.Selection.from_mask(part), return_lse=True)
        for part in (mask, ~mask)
    )
    share = (lse_a - torch.logaddexp(lse_a, lse_b)).exp().transpose(1, 2).view(*q.shape[:-1], 1)
    merged, dense = a * share + b * (1 - share), vsa.attention(q, k, v, 1.0)
    assert worst(merged, dense) < DOUBLE
    grads = [
        torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (merged, dense)
    ]
    assert all(worst(x, y) < 1e-11 for x, y in zip(*grads, strict=True))


def test_auto_tile_is_exact_too() -> None:
    q, k, v = torch.randn(3, 1, 3, 10, 8, 2, 16, dtype=torch.float64)
    out, selection = vsa.attention(q, k, v, 0.4, tile="auto", return_selection=True)
    assert selection.grid.tile == vsa.best_tile((3, 10, 8)) != (4, 4, 4)
    explicit = vsa.attention(q, k, v, 0.4, tile=vsa.best_tile((3, 10, 8)))
    assert torch.equal(out, explicit)


def test_autocast_accepts_mixed_types_and_keeps_scores_in_full_precision() -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 7, 2, 16)
    gate = torch.randn(1, 5, 6, 7, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vsa.attention(q, k.bfloat16(), v, 3, gate_coarse=gate)
    assert out.dtype == torch.bfloat16
    assert torch.equal(
        out, vsa.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, gate_coarse=gate)
    )
