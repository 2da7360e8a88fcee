# SPDX-License-Identifier: Apache-2.0
"""Masks over tiles: ``mask=`` against the specification, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.masks import ChunkCausal, TeacherForcing, Window
from vsa.values import masks
from vsa.verify import dense, mask_reference, reference
from vsa.verify.parity import expected, ours, relative_to_sdpa, worst
from vsa.verify.problems import MASKED, Problem, by_name

DOUBLE = 1e-12
GRID = vsa.Grid((6, 5, 6), tile=(3, 5, 4))


def qkv(*shape: int, dtype: torch.dtype = torch.float64, heads: int = 2) -> list[Tensor]:
    shape = shape or GRID.shape
    return list(torch.randn(3, 1, *shape, heads, 16, dtype=torch.float64).to(dtype))


@st.composite
def rules(draw: st.DrawFn) -> tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A mask, a tile that fits it, and the grids of queries and keys."""
    number = st.integers(1, 4)
    unit, h, w = draw(number), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    side = st.sampled_from([1, 2, 3, 4])
    kind = draw(st.sampled_from(["chunks", "forcing", "window"]))
    tile = unit, draw(side), draw(side)
    if kind == "forcing":
        half = unit * draw(number)
        shape = 2 * half, h, w
        return TeacherForcing(unit * draw(number)), tile, shape, shape
    past, shape = unit * draw(st.integers(0, 6)), (unit * draw(number), h, w)
    keys = past + shape[0], h, w
    if kind == "window":
        reach = st.integers(0, 3)
        return Window((draw(reach), draw(reach), draw(reach))), tile, shape, keys
    window = draw(st.none() | number)
    mask = ChunkCausal(unit * draw(number), window=window, sinks=draw(st.integers(0, 3)))
    return mask, tile, shape, keys


@given(case=rules())
@settings(max_examples=120, deadline=None)
def test_a_rule_on_tiles_is_the_rule_on_frames(case: Any) -> None:
    mask, tile, shape, keys = case
    grid, kv_grid = vsa.Grid(shape, tile=tile), vsa.Grid(keys, tile=tile)
    found = masks.resolve(mask, grid, kv_grid, heads=1)
    assert found is not None
    truth = mask_reference.allowed(mask, shape, tile, keys)
    assert torch.equal(found.matrix(grid.num_tiles, None)[0], truth)
    assert torch.equal(found.seen(1, torch.device("cpu"))[0], truth.any(0))
    assert truth.any(1).all(), "under a rule no row is without a tile"
    assert torch.equal(torch.cat(list(found.counts(grid.num_tiles)), 1)[0], truth.sum(1))


@given(case=rules(), topk=st.sampled_from([1, 3, 0.3, 1.0, (2, 0.6), 0.7]), mass=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_grid_is_the_definition(case: Any, topk: Any, mass: bool) -> None:
    mask, tile, shape, keys = case
    tile = tile[0], max(tile[1], 3), max(tile[2], 3)
    budget: Any = vsa.TopP(0.8, floor=topk) if mass and isinstance(topk, float) else topk
    problem = Problem(
        "", grid=shape, kv_grid=keys, tile=tile, topk=budget, mask=mask, gate_coarse=True
    )  # type: ignore[arg-type]
    tensors = problem.inputs()
    truth, chosen = expected(problem, tensors, oracle=dense.attention)
    found, selection = ours(problem, tensors)
    assert torch.equal(selection.mask(), chosen)
    assert worst(found.out, truth.out) < DOUBLE
    for name, grad in truth.grads.items():
        assert worst(found.grads[name], grad) < 10 * DOUBLE, name


@pytest.mark.parametrize("problem", MASKED, ids=lambda problem: problem.name)
def test_attention_is_the_reference(problem: Problem) -> None:
    tensors = problem.inputs()
    truth, mask = expected(problem, tensors)
    for result, chosen in (
        expected(problem, tensors, oracle=dense.attention),
        ours(problem, tensors),
    ):
        chosen = chosen.mask() if isinstance(chosen, vsa.Selection) else chosen
        assert torch.equal(chosen, mask)
        assert worst(result.out, truth.out) < DOUBLE
        assert torch.allclose(result.lse, truth.lse, rtol=1e-12, atol=1e-12)
        for name, grad in truth.grads.items():
            assert worst(result.grads[name], grad) < 10 * DOUBLE, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", MASKED, ids=lambda problem: problem.name)
def test_error_is_at_most_twice_that_of_sdpa(problem: Problem, dtype: torch.dtype) -> None:
    ratios = relative_to_sdpa(by_name(problem.name, dtype=dtype), gradients=True)
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def by_heads(empty: bool = True) -> Tensor:
    """(heads, n_q, n_k), another for each head; a row of each may choose nothing."""
    n = GRID.num_tiles
    allowed = torch.rand(2, n, n, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[:, torch.arange(n), torch.arange(n)] = True
    if empty:
        allowed[0, 1] = allowed[1, 2] = False
    return allowed


def test_a_tensor_for_each_head_is_the_reference() -> None:
    allowed, tensors = by_heads(), [x.requires_grad_() for x in qkv()]
    gate = torch.randn(1, *GRID.shape, 2, 16, dtype=torch.float64)
    for tail in (False, True):
        out, selection, lse = vsa.attention(
            *tensors, 2, grid=GRID, mask=allowed, gate_coarse=gate, tail=tail,
            return_selection=True, return_lse=True,
        )  # fmt: skip
        flat = [x.flatten(1, 3) for x in (*tensors, gate)]
        truth, chosen, true_lse = reference.attention(
            *flat[:3], 2, grid=GRID.shape, tile=GRID.tile, gate_coarse=flat[3], allowed=allowed,
            tail=tail,
        )  # fmt: skip
        assert torch.equal(selection.mask(), chosen)
        assert worst(out.detach().flatten(1, 3), truth.detach()) < DOUBLE
        assert torch.allclose(lse, true_lse)
        assert (lse == -math.inf).any()
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad((out * upstream).sum(), tensors, retain_graph=True)
        true = torch.autograd.grad((truth * upstream.flatten(1, 3)).sum(), tensors)
        for grad, other in zip(grads, true, strict=True):
            assert worst(grad, other) < 10 * DOUBLE


def test_a_row_that_may_choose_nothing_is_zero() -> None:
    allowed = torch.ones(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    allowed[1] = False
    q, k, v = qkv()
    out, lse = vsa.attention(q, k, v, 0.5, grid=GRID, mask=allowed, return_lse=True)
    idle = GRID.tile_of_token() == 1
    assert (out.flatten(1, 3)[:, idle] == 0).all() and (lse[..., idle] == -math.inf).all()
    assert (out.flatten(1, 3)[:, ~idle] != 0).all() and lse[..., ~idle].isfinite().all()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_no_row_may_choose_reaches_nothing(as_tensor: bool, tail: bool) -> None:
    """Keys and values of a chunk that has left the window are NaN, and so is an idle query."""
    keys, mask = (12, 5, 6), ChunkCausal(3, window=1, sinks=1)
    rule: Any = mask
    grid, kv_grid = GRID, vsa.Grid(keys, tile=GRID.tile)
    q, k, v = qkv()[0], *qkv(*keys)[1:]
    if as_tensor:
        rule = mask_reference.allowed(mask, grid.shape, grid.tile, keys)
        rule[1] = False
    seen = mask_reference.allowed(mask, grid.shape, grid.tile, keys).any(0)
    assert not seen.all()
    lost = ~seen[kv_grid.tile_of_token()].view(keys)
    results = []
    for poison in (1.0, math.nan):
        poisoned = [q.clone(), k.clone(), v.clone()]
        for x in poisoned[1:]:
            x[:, lost] = poison
        leaves = [x.requires_grad_() for x in poisoned]
        out, lse = vsa.attention(
            *leaves, 0.5, grid=grid, kv_grid=kv_grid, mask=rule, tail=tail, return_lse=True,
            gate_coarse=torch.ones(1, 1, 1, 1, 2, 1, dtype=q.dtype),
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out.sum(), leaves), lse])
    for clean, other in zip(*results, strict=True):
        assert other.isfinite().all() or as_tensor
        torch.testing.assert_close(clean, other, rtol=0, atol=0)


def test_everything_is_dense_attention_under_the_mask() -> None:
    q, k, v = qkv(6, 4, 6)
    mask = TeacherForcing(1)
    out, selection = vsa.attention(q, k, v, 1.0, tile=(1, 4, 4), mask=mask, return_selection=True)
    frame = torch.arange(6 * 4 * 6) // 24
    attends = torch.tensor(
        [[mask_reference.teacher_forcing(t, s, 3, 1) for s in range(6)] for t in range(6)]
    )[frame[:, None], frame]
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
    truth = functional.scaled_dot_product_attention(q, k, v, attends).transpose(1, 2)
    torch.testing.assert_close(out.flatten(1, 3), truth)
    assert selection.most is not None and selection.under is not None


def test_training_and_a_chunk_over_its_past_are_the_same() -> None:
    mask, grid = ChunkCausal(3), (9, 4, 6)
    q, k, v = qkv(*grid)
    gate = torch.randn(1, *grid, 2, 16, dtype=torch.float64)
    options: Any = {"tile": "auto", "mask": mask, "return_selection": True}
    whole, chosen = vsa.attention(q, k, v, 0.4, gate_coarse=gate, **options)
    for chunk in range(3):
        own, past = slice(3 * chunk, 3 * chunk + 3), slice(0, 3 * chunk + 3)
        out, selection = vsa.attention(
            q[:, own], k[:, past], v[:, past], 0.4, kv_grid=(past.stop, 4, 6),
            gate_coarse=gate[:, own], **options,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, own])
        rows = selection.shape[2]
        expected_rows = chosen.mask()[:, :, chunk * rows :][:, :, :rows]
        assert torch.equal(selection.mask(), expected_rows[..., : selection.num_key_tiles])


def test_a_share_is_of_what_a_row_may_choose() -> None:
    q, k, _ = qkv(9, 4, 6)
    for topk in (0.4, 5, 1, (3, 0.4)):
        selection = vsa.select(q, k, topk, tile=(3, 4, 3), mask=ChunkCausal(3))
        kept = selection.mask().sum(-1)[0]
        may = torch.tensor([2, 4, 6]).repeat_interleave(2)
        for head in range(2):
            each = topk[head] if isinstance(topk, tuple) else topk
            least = (may * each).ceil() if isinstance(each, float) else may.clamp(max=each)
            assert torch.equal(kept[head], least.long().clamp(min=1)), topk


def test_best_tile_never_straddles() -> None:
    assert vsa.best_tile((3, 30, 52), frames=3) == (3, 5, 4)
    assert vsa.best_tile((21, 30, 52), frames=3) == (3, 5, 4)
    for frames in range(1, 7):
        for shape in ((5, 9, 7), (12, 4, 4), (21, 30, 52)):
            tile = vsa.best_tile(shape, frames=frames)
            assert frames % tile[0] == 0 and math.prod(tile) <= 64
    _, selection = vsa.attention(
        *qkv(6, 6, 6), 0.5, tile="auto", mask=ChunkCausal(3), return_selection=True
    )
    assert selection.grid is not None and selection.grid.tile == vsa.best_tile((6, 6, 6), frames=3)


SENTENCES: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, r"^tile .*\(3, 5, 4\)", lambda: _run(ChunkCausal(3), (6, 30, 52), tile=(4, 4, 4))),
    (ValueError, "^tile .*straddles", lambda: _run(TeacherForcing(4), (12, 4, 4), tile=(4, 4, 4))),
    (ValueError, "^mask TeacherForcing needs two", lambda: _run(TeacherForcing(1), (5, 4, 4))),
    (ValueError, "^mask must be", lambda: _run(torch.ones(3, 3).bool(), (4, 4, 4))),
    (TypeError, "^mask must be one of", lambda: _run(torch.ones(1, 1), (4, 4, 4))),
    (TypeError, "^mask must be one of", lambda: _run("causal", (4, 4, 4))),
    (ValueError, "^frames must be at least", lambda: ChunkCausal(0)),
    (TypeError, "^frames must be a whole", lambda: TeacherForcing(1.5)),  # type: ignore[arg-type]
    (ValueError, "^window must be at least", lambda: ChunkCausal(1, window=0)),
    (TypeError, "^reach must be three", lambda: Window(3)),  # type: ignore[arg-type]
    (ValueError, "^reach along h", lambda: Window((1, -1, 1))),
    (ValueError, "last frames", lambda: _run(ChunkCausal(1), (4, 4, 4), kv_grid=(3, 4, 4))),
    (ValueError, "height and width", lambda: _run(ChunkCausal(1), (4, 4, 4), kv_grid=(4, 4, 5))),
    (ValueError, "^tile must cut", lambda: _run(Window((1, 1, 1)), (4, 4, 4), kv_grid=(6, 4, 4))),
    (ValueError, "frames of the queries", lambda: _run(TeacherForcing(1), (2, 4, 4), (4, 4, 4))),
    (ValueError, "^grid must say", lambda: vsa.attention(*_flat(), 1, mask=ChunkCausal(1))),
]


def _flat() -> list[Tensor]:
    return [torch.randn(1, 96, 1, 8) for _ in "qkv"]


def _run(mask: Any, grid: Any, kv_grid: Any = None, tile: Any = (2, 4, 4)) -> object:
    if mask == "causal" or isinstance(mask, Tensor):
        tile = (4, 4, 4)
    q, k = (torch.randn(1, *shape, 1, 8) for shape in (grid, kv_grid or grid))
    if isinstance(mask, (ChunkCausal, TeacherForcing)) and mask.frames == 1:
        tile = (1, 4, 4)
    if isinstance(mask, Window):
        tile = (4, 4, 4)
    return vsa.attention(q, k, k, 1, mask=mask, tile=tile, kv_grid=kv_grid)


@pytest.mark.parametrize("case", SENTENCES, ids=range(len(SENTENCES)))
def test_what_does_not_fit_is_said_in_a_sentence(case: Any) -> None:
    kind, sentence, call = case
    with pytest.raises(kind, match=sentence):
        call()


def test_must_lies_inside_of_a_rule() -> None:
    q, k, _ = qkv()
    ahead = torch.zeros(GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    ahead[0, -1] = True
    with pytest.raises(ValueError, match=r"^must has to lie inside"):
        vsa.select(q, k, 1, grid=GRID, mask=ChunkCausal(3), must=ahead)
    allowed = mask_reference.allowed(ChunkCausal(3), GRID.shape, GRID.tile)
    tensor = vsa.select(q, k, 1, grid=GRID, mask=allowed, must=ahead)
    assert not (tensor.mask() & ~allowed).any(), "of a tensor the mask wins"
    own = vsa.select(q, k, 1, grid=GRID, mask=ChunkCausal(3), must="self")
    assert torch.equal(own.mask()[0, 0], torch.eye(GRID.num_tiles).bool())


def test_a_selection_lies_inside_and_brings_its_mask() -> None:
    q, k, v = qkv()
    mask, gate = ChunkCausal(3), torch.ones(1, 1, 1, 1, 2, 1, dtype=torch.float64)
    inside = vsa.select(q, k, 0.5, grid=GRID, mask=mask)
    outside = vsa.select(q, k, 1.0, grid=GRID)
    with pytest.raises(ValueError, match=r"^selection must lie inside"):
        vsa.block_sparse_attention(q, k, v, outside, mask=mask)
    with pytest.raises(ValueError, match=r"^mask cannot stand beside selection"):
        vsa.attention(q, k, v, None, selection=inside, mask=mask)
    for tail in (False, True):
        out = vsa.block_sparse_attention(q, k, v, inside, mask=mask, tail=tail)
        unknown = vsa.Selection.from_mask(inside.mask(), GRID)
        again = vsa.block_sparse_attention(q, k, v, unknown, mask=mask, tail=tail)
        assert torch.equal(out, again)
        whole = vsa.attention(q, k, v, 0.5, grid=GRID, mask=mask, gate_coarse=gate, tail=tail)
        reused = vsa.attention(q, k, v, None, selection=inside, gate_coarse=gate, tail=tail)
        torch.testing.assert_close(reused, whole)


def test_nan_scores_stay_inside_of_the_mask() -> None:
    """A NaN counts as the lowest score of those that a row may choose, and no lower."""
    q, k, _ = qkv(9, 4, 6)
    k[:, :6] = math.nan
    for topk in (3, 0.9, vsa.TopP(0.5, floor=3)):
        selection = vsa.select(q, k, topk, tile=(3, 4, 3), mask=ChunkCausal(3, window=2))
        allowed = mask_reference.allowed(ChunkCausal(3, window=2), (9, 4, 6), (3, 4, 3))
        kept = selection.mask()
        assert not (kept & ~allowed).any() and (kept.sum(-1) >= 2).all()


@pytest.mark.parametrize("topk", [0.4, 3, vsa.TopP(0.6), 1.0], ids=str)
def test_one_graph_with_the_same_results(topk: Any) -> None:
    q, k, v = (x.float() for x in qkv())
    gate = torch.ones(1, 1, 1, 1, 2, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = ChunkCausal(3, window=2)
        return vsa.attention(q, k, v, topk, grid=GRID, mask=mask, gate_coarse=gate)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_a_share_that_varies_under_a_mask_is_data() -> None:
    q, k, _ = (x.float() for x in qkv(9, 4, 6))

    def choose(topk: float) -> Tensor:
        return vsa.select(q, k, topk, tile=(3, 4, 3), mask=ChunkCausal(3)).bitmap

    compiled = torch.compile(choose, backend="aot_eager", fullgraph=True)
    for topk in (0.3, 0.5, 0.7, 0.9):
        assert torch.equal(compiled(topk), choose(topk))


def test_operators_are_ones_that_pytorch_can_follow() -> None:
    rule = list(masks.resolve(ChunkCausal(3), GRID, GRID, 1).rule)  # type: ignore[union-attr]
    n = GRID.num_tiles
    q_means, k_means, v_means = torch.randn(3, 1, 2, n, 8)
    for mask in ((rule, None), ([], by_heads())):
        scores = q_means, k_means, None, [3], 0.0, None, 0.3, "torch", *mask, [0.5]
        torch.library.opcheck(torch.ops.vsa.select_tiles, scores)
        torch.library.opcheck(torch.ops.vsa.select_and_attend, (*scores, v_means))
        torch.library.opcheck(
            torch.ops.vsa.coarse_attention, (q_means, k_means, v_means, 0.3, "torch", *mask)
        )


def test_flops_and_recall_count_under_the_mask() -> None:
    grid = vsa.Grid((9, 4, 6), tile=(3, 4, 3))
    q, k, _ = qkv(*grid.shape)
    mask = ChunkCausal(3)
    dense, causal = (vsa.flops(grid, 2, 16, 0.5, mask=each) for each in (None, mask))
    # Rows of three chunks may choose 2, 4 and 6 of 6 tiles, and keep 1, 2 and 3 of them.
    assert causal.full == pytest.approx(dense.full * 4 / 6)
    assert causal.fine == pytest.approx(dense.fine * 2 / 3)
    assert causal.select == pytest.approx(dense.select * 4 / 6)
    selection = vsa.select(q, k, 1.0, grid=grid, mask=mask)
    whole = torch.ones(1, 2, dtype=torch.float64)
    torch.testing.assert_close(selection.recall(q, k), whole)
    few = vsa.select(q, k, 1, grid=grid, mask=mask)
    under = few.recall(q, k)
    torch.testing.assert_close(
        vsa.Selection.from_mask(few.mask(), grid).recall(q, k, mask=mask), under
    )
    assert (under < 1).all()
    assert (under > vsa.Selection.from_mask(few.mask(), grid).recall(q, k)).all()
    curve = vsa.diagnostics.recall_curve(q, k, [1, 1.0], grid=grid, mask=mask)
    torch.testing.assert_close(curve.recall, torch.stack((under, whole)))


def test_a_layer_under_a_mask() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 2, 0.5, tile="auto", mask=ChunkCausal(3)).double()
    x = torch.randn(1, 6, 5, 6, 32, dtype=torch.float64)
    later = x.clone()
    later[:, 3:] += 1
    assert torch.equal(layer(x)[:, :3], layer(later)[:, :3])
    assert not torch.equal(layer(x)[:, 3:], layer(later)[:, 3:])
    assert "ChunkCausal" in repr(layer)
    with pytest.raises(TypeError, match=r"^mask must be one of"):
        vsa.nn.VideoSparseAttention(32, 2, mask="causal")  # type: ignore[arg-type]
