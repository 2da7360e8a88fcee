# SPDX-License-Identifier: Apache-2.0
"""Calls under a mask: prepared and compiled ones, selections, errors, and what counts under it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from python.test_masks import GRID, by_heads, qkv
from python.test_no_waiting import READS
from torch import Tensor

import vsa
from vsa.backends import BACKENDS, Request
from vsa.masks import ChunkCausal, TeacherForcing, Window
from vsa.stages import eager
from vsa.values import masks
from vsa.verify import mask_reference
from vsa.verify.problems import by_name


@pytest.mark.parametrize("name", ["chunk-causal", "teacher-forcing", "chunk-causal-window"])
def test_prepared_and_compiled_calls_give_the_same_bits(name: str) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    problem = by_name(name, dtype=torch.bfloat16, head_dim=64, tail=False)
    tensors = {key: x for key, x in problem.inputs().items() if not key.startswith("upstream")}
    kv_grid = None if problem.kv_grid is None else problem.key_grid

    def run() -> list[Tensor]:
        leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
        out, selection = vsa.attention(
            **leaves, topk=problem.topk, grid=problem.query_grid, kv_grid=kv_grid,
            mask=problem.mask, backend="emulated", return_selection=True,
        )  # fmt: skip
        assert selection.under is not None
        grads = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
        return [out.detach(), selection.bitmap, *grads]

    with eager.paused():
        expected = run()
    plans = set(eager._plans.values)
    for found in (run(), run()):
        assert all(map(torch.equal, found, expected))
    made = [eager._plans.values[key] for key in set(eager._plans.values) - plans]
    assert made and all(plan.prepared is not None and plan.mask is not None for plan in made)

    def forward() -> Tensor:
        return vsa.attention(
            **tensors, topk=problem.topk, grid=problem.query_grid, kv_grid=kv_grid,
            mask=problem.mask, backend="emulated",
        )  # fmt: skip

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), expected[0])


@pytest.mark.parametrize("coarse", [False, True])
def test_kernels_read_nothing_that_no_row_may_choose(coarse: bool) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    mask, keys = ChunkCausal(3, window=1, sinks=1), (12, 5, 6)
    kv_grid = vsa.Grid(keys, tile=GRID.tile)
    seen = mask_reference.allowed(mask, GRID.shape, GRID.tile, keys).any(0)
    lost = ~seen[kv_grid.tile_of_token()].view(keys)
    q, k, v = (torch.randn(1, *shape, 2, 64).bfloat16() for shape in (GRID.shape, keys, keys))
    gate = torch.ones_like(q) if coarse else None
    results = []
    for poison in (1.0, math.nan):
        for x in (k, v):
            x[:, lost] = poison
        for _ in range(2):  # the second is a prepared call
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = vsa.attention(
                *leaves, 0.5, grid=GRID, kv_grid=kv_grid, mask=mask, gate_coarse=gate,
                backend="emulated",
            )  # fmt: skip
            results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert all(x.isfinite().all() for x in results[-1])


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
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert "ChunkCausal" in repr(layer)
    with pytest.raises(TypeError, match=r"^mask must be one of"):
        vsa.nn.VideoSparseAttention(32, 2, mask="causal")  # type: ignore[arg-type]


def step(mask: Any, backend: str, device: str, tail: bool) -> Callable[[], list[Tensor]]:
    """Inference and a training step with a coarse gate, and the choice alone."""
    tensors = torch.randn(4, 1, *GRID.shape, 2, 64, device=device).bfloat16().unbind()
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = {"grid": GRID, "mask": mask, "backend": backend}

    def run() -> list[Tensor]:
        *qkv, gate = leaves
        with torch.no_grad():
            words = vsa.select(*qkv[:2], vsa.TopP(0.5), **options).bitmap
            once = vsa.attention(*qkv, 0.5, gate_coarse=gate, tail=tail, **options)
        out = vsa.attention(*qkv, (2, 0.5), gate_coarse=gate, tail=tail, **options)
        return [words, once, *torch.autograd.grad(out.float().sum(), leaves)]

    return run


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("kind", ["rule", "tensor"])
def test_nothing_waits_for_the_device(kind: str, tail: bool) -> None:
    pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")
    run = step(ChunkCausal(3) if kind == "rule" else by_heads(), "emulated", "cpu", tail)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):  # the second time by plans, where there are some
            run()
    assert not {event.key for event in profile.key_averages()} & READS


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("kind", ["rule", "tensor"])
def test_a_step_is_captured_in_a_cuda_graph(kind: str, tail: bool) -> None:
    if not torch.cuda.is_available() or BACKENDS["hopper"].why_not(Request("cuda")) is not None:
        pytest.skip("needs a Hopper GPU")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mask = ChunkCausal(3) if kind == "rule" else by_heads().cuda()
        run = step(mask, "hopper", "cuda", tail)
        expected = [x.clone() for x in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_mask_beside_a_sequence_is_refused() -> None:
    sequence, mask = vsa.Sequence([(3, 5, 6), (3, 5, 6)]), ChunkCausal(3)
    q, k, v = (x.flatten(1, 3) for x in qkv())
    for call in (
        lambda: vsa.attention(q, k, v, 1, grid=sequence, mask=mask),
        lambda: vsa.select(q, k, 1, grid=sequence, mask=mask),
        lambda: vsa.flops(sequence, 2, 16, 1, mask=mask),
    ):
        with pytest.raises(ValueError, match=r"^mask must be None for this grid"):
            call()
