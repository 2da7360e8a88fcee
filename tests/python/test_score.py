# SPDX-License-Identifier: Apache-2.0
"""score=vsa.SubBlocks(n): what it chooses, held to the specification, and where it is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vsa
from vsa.backends import BACKENDS, Request
from vsa.backends.torch_sub_blocks import run_means, run_sizes
from vsa.verify import dense, parity, reference

GRID = (3, 9, 10)
BY_RUNS = [problem for problem in parity.PROBLEMS if problem.runs > 1]


def sliver(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A query tile and four key tiles, all of whose means are zero; a part of one is strong."""
    q = torch.zeros(1, 1, 1, 64, 1, 16, dtype=dtype)
    k = torch.zeros(1, 1, 1, 256, 1, 16, dtype=dtype)
    q[..., 0] = 1
    k[0, 0, 0, 128 + 16 : 128 + 32, 0, 0] = 9
    k[0, 0, 0, 128 + 32 : 128 + 48, 0, 0] = -9
    return q, k


def test_a_part_that_matters_is_found_where_the_mean_hides_it() -> None:
    q, k = sliver()
    options = {"kv_grid": (1, 1, 256), "tile": (1, 1, 64)}
    by_mean = vsa.select(q, k, 1, **options).mask().flatten().tolist()
    by_parts = vsa.select(q, k, 1, score=vsa.SubBlocks(4), **options).mask().flatten().tolist()
    assert by_mean == [True, False, False, False]  # a tie
    assert by_parts == [False, False, True, False]


def scores_of(q: Tensor, k: Tensor, n: int) -> Tensor:
    """Of one head of q and k, (1, S, 1, D), by the specification."""
    tiles = [reference.tiles_of((5, 6, 7), (4, 4, 4), 0)] * 2
    return reference.sub_block_scores(q[0, :, 0], k[0, :, 0], *tiles, n, q.shape[-1] ** -0.5)


@settings(deadline=None, max_examples=40)
@given(
    extent=st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
    keys=st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([(4, 4, 4), (3, 5, 4), (1, 2, 3), (1, 1, 1), (2, 8, 4), (1, 1, 64)]),
    n=st.integers(2, 16),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    batch=st.integers(1, 2),
    text=st.sampled_from([(0, 0), (3, 0), (2, 5)]),
    share=st.floats(0.05, 1.0),
    mass=st.sampled_from([0.0, 0.5, 0.9]),
    magnitude=st.sampled_from([1.0, 8.0, 100.0]),
    seed=st.integers(0, 5),
)
def test_every_choice_is_that_of_the_specification(
    extent: tuple[int, int, int],
    keys: tuple[int, int, int],
    tile: tuple[int, int, int],
    n: int,
    heads: tuple[int, int],
    batch: int,
    text: tuple[int, int],
    share: float,
    mass: float,
    magnitude: float,
    seed: int,
) -> None:
    prefix, suffix = text
    problem = parity.Problem(
        "any",
        grid=extent,
        kv_grid=keys,
        tile=tile,
        batch=batch,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=8,
        prefix=prefix,
        suffix=suffix,
        magnitude=magnitude,
        runs=n,
    )
    tensors = problem.inputs(seed)
    topk = vsa.TopP(mass, floor=share) if mass else share
    chosen = vsa.select(
        tensors["q"],
        tensors["k"],
        topk,
        grid=problem.query_grid,
        kv_grid=problem.key_grid,
        score=vsa.SubBlocks(n),
    )
    q, k = (tensors[name].transpose(1, 2) for name in "qk")
    k = k.repeat_interleave(heads[0] // heads[1], dim=1)
    parts = [dense.tiles_in_runs(shape, tile, prefix, suffix, n) for shape in (extent, keys)]
    scores = dense.sub_block_scores(q, k, parts, 8**-0.5)
    assert torch.equal(chosen.mask(), dense.choice(scores, share, mass))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "hopper"])
@pytest.mark.parametrize("problem", BY_RUNS, ids=lambda problem: problem.name)
def test_the_whole_call_is_that_of_the_specification(problem: parity.Problem, backend: str) -> None:
    dtype = torch.bfloat16 if backend == "emulated" else torch.float32
    head_dim = 64 if backend == "emulated" else problem.head_dim
    problem = replace(problem, dtype=dtype, head_dim=head_dim)
    found = parity.relative_to_sdpa(problem, backend=backend, gradients=backend != "flex")
    assert all(each <= 2 for each in found.values()), found


def test_dense_and_reference_agree_on_scores() -> None:
    q, k = torch.randn(2, 1, 210, 1, 8, dtype=torch.float64)
    parts = [dense.tiles_in_runs((5, 6, 7), (4, 4, 4), 0, 0, 5)] * 2
    by_matrices = dense.sub_block_scores(q.transpose(1, 2), k.transpose(1, 2), parts, 8**-0.5)
    torch.testing.assert_close(by_matrices[0, 0], scores_of(q, k, 5))


def test_one_run_is_the_mean() -> None:
    q, k, v = torch.randn(3, 2, *GRID, 2, 16).unbind()
    mean = vsa.attention(q, k, v, 3, return_selection=True)
    one = vsa.attention(q, k, v, 3, score=vsa.SubBlocks(1), return_selection=True)
    assert torch.equal(mean[0], one[0]) and torch.equal(mean[1].bitmap, one[1].bitmap)
    x = scores_of(*(each.flatten(1, 3)[:1, :210, :1].double() for each in (q, k)), 1)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    ("size", "n", "sizes"),
    [(64, 4, [16] * 4), (10, 4, [3, 3, 2, 2]), (3, 4, [1, 1, 1, 0]), (1, 16, [1] + [0] * 15)],
)
def test_runs_are_as_even_as_can_be_and_longer_ones_come_first(
    size: int, n: int, sizes: list[int]
) -> None:
    assert run_sizes(torch.tensor([size]), n).flatten().tolist() == sizes
    runs = reference.runs_of(range(size), n)
    assert [len(run) for run in runs] == [each for each in sizes if each]
    assert [token for run in runs for token in run] == list(range(size))


def test_tiles_of_fewer_tokens_than_runs_have_one_for_each() -> None:
    """Empty runs take no part: tiles of one token score as their tokens, whatever n is."""
    q, k = torch.randn(2, 1, 1, 1, 7, 1, 8, dtype=torch.float64)
    by_mean = vsa.select(q, k, 3, tile=(1, 1, 1))
    by_runs = vsa.select(q, k, 3, tile=(1, 1, 1), score=vsa.SubBlocks(4))
    assert torch.equal(by_mean.bitmap, by_runs.bitmap)
    grid = vsa.Grid((1, 1, 7), tile=(1, 1, 4))
    means = run_means(q.flatten(1, 3), grid, 4)[0, 0]
    torch.testing.assert_close(means.flatten(0, 1)[:7], q.flatten(0, 4))
    assert (means[1, 3] == 0).all()


def test_nothing_flows_through_the_choice_and_the_coarse_branch_is_the_papers() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in torch.randn(5, 1, *GRID, 2, 16).unbind()]
    q, k, v, gate_coarse, gate_fine = tensors
    gates = {"gate_coarse": gate_coarse, "gate_fine": gate_fine}
    out, chosen = vsa.attention(q, k, v, 4, score=vsa.SubBlocks(4), return_selection=True, **gates)
    given_choice = vsa.attention(q, k, v, None, selection=chosen, **gates)
    by_mean = vsa.select(q, k, 4)
    assert not torch.equal(by_mean.bitmap, chosen.bitmap)
    torch.testing.assert_close(out, given_choice)
    upstream = torch.randn_like(out)
    ours, expected = (torch.autograd.grad(x, tensors, upstream) for x in (out, given_choice))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_forced_tiles_and_heads_of_their_own() -> None:
    q, k = torch.randn(1, *GRID, 4, 16), torch.randn(1, *GRID, 2, 16)
    score = vsa.SubBlocks(4)
    own = vsa.select(q, k, 2, must="self", score=score).mask()
    assert own.diagonal(dim1=-2, dim2=-1).all() and (own.sum(-1) == 2).all()
    each = vsa.select(q, k, (1, 2, 3, 0.5), score=score).mask().sum(-1)
    assert (each == torch.tensor([1, 2, 3, 5])[:, None]).all()
    whole = vsa.select(q, k.repeat_interleave(2, -2), 3, score=score)
    assert torch.equal(whole.bitmap, vsa.select(q, k, 3, score=score).bitmap)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k = (x.double() * 300 for x in torch.randn(2, 1, *GRID, 1, 16))
    chosen = vsa.select(q, k, 2, score=vsa.SubBlocks(4)).mask()
    parts = [dense.tiles_in_runs(GRID, (4, 4, 4), 0, 0, 4)] * 2
    flat = (x.flatten(1, 3).transpose(1, 2) for x in (q, k))
    scores = dense.sub_block_scores(*flat, parts, 0.25)
    assert scores.abs().max() > 1000 and torch.isfinite(scores).all()
    assert torch.equal(chosen, dense.choice(scores, 2))
    narrow = vsa.select(q.float(), k.float(), 2, score=vsa.SubBlocks(4)).mask()
    assert torch.equal(narrow, chosen)


def test_text_and_strides_take_no_part() -> None:
    grid = vsa.Grid(GRID, prefix=3, suffix=4)
    wide = torch.full((2, grid.length, 6, 32), math.nan)
    video = slice(3, 3 + grid.tokens)
    q, k = wide[:, :, 1:3, 8:24], wide[:, :, 3:5, 8:24]
    for x in (q, k):
        x[:, video] = torch.randn(2, grid.tokens, 2, 16)
    score = vsa.SubBlocks(5)
    strided = vsa.select(q, k, 3, grid=grid, score=score)
    q, k = (x[:, video].contiguous() for x in (q, k))
    plain = vsa.select(q, k, 3, grid=GRID, score=score)
    assert torch.equal(strided.bitmap, plain.bitmap)


def test_nan_counts_as_the_lowest_score() -> None:
    q, k = sliver(torch.float32)
    k[0, 0, 0, 130, 0, 3] = math.nan
    options = {"kv_grid": (1, 1, 256), "tile": (1, 1, 64), "score": vsa.SubBlocks(4)}
    assert vsa.select(q, k, 3, **options).mask().flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("n", "kind", "words"),
    [
        (0, ValueError, "n must be at least 1, but it is 0"),
        (17, ValueError, "n must be from 1 to 16 runs of a tile, but it is 17"),
        (2.0, TypeError, "n must be a whole number"),
        (True, TypeError, "n must be a whole number"),
    ],
)
def test_bad_numbers_of_runs(n: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        vsa.SubBlocks(n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "kind"), [("max", ValueError), (4, TypeError), (None, TypeError)]
)
def test_bad_scores_are_refused_everywhere(score: object, kind: type[Exception]) -> None:
    q, k, v = torch.randn(3, 1, *GRID, 2, 16).unbind()
    words = r'score must be "mean" or a vsa\.SubBlocks, but it is'
    chosen = vsa.select(q, k, 3)
    calls = [
        lambda: vsa.attention(q, k, v, 3, score=score),
        lambda: vsa.attention(q, k, v, None, selection=chosen, score=score),
        lambda: vsa.select(q, k, 3, score=score),
        lambda: vsa.nn.VideoSparseAttention(32, 2, score=score),
        lambda: vsa.flops(GRID, 2, 16, 3, score=score),
        lambda: vsa.diagnostics.recall_curve(q, k, [3], score=score),
    ]
    for call in calls:
        with pytest.raises(kind, match=words):
            call()


def test_a_layer_and_its_picture_have_the_score() -> None:
    torch.manual_seed(1)
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=2, score=vsa.SubBlocks(4), gates=None)
    assert "score=SubBlocks(n=4)" in repr(layer)
    x = torch.randn(1, *GRID, 32)
    by_parts = layer(x)
    layer.score = "mean"
    assert not torch.equal(by_parts, layer(x))


def test_recall_at_equal_budgets_compares_scores() -> None:
    torch.manual_seed(0)
    # Tiles in which one quarter of the tokens points somewhere: means point nowhere.
    grid = vsa.Grid((4, 8, 16))
    direction = torch.nn.functional.normalize(torch.randn(grid.num_tiles, 16), dim=-1)
    sign = torch.zeros(64)
    sign[:16], sign[16:32] = 1, -1
    k = (grid.to_tiles(torch.zeros(1, grid.tokens, 1, 16)) + 0).squeeze(-2)
    k = k + 6 * sign[:, None] * direction[:, None]
    q = k.roll(1, dims=1)
    q, k = (grid.from_tiles(x.unsqueeze(-2)) for x in (q, k))
    q = q + 0.1 * torch.randn_like(q)
    curves = {
        score: vsa.diagnostics.recall_curve(q, k, [1, 2, 0.5], grid=grid, score=score)
        for score in ("mean", vsa.SubBlocks(4))
    }
    mean, parts = curves.values()
    assert torch.equal(mean.density, parts.density)
    assert (parts.recall[0] > mean.recall[0] + 0.05).all()
    chosen = vsa.select(q, k, 2, grid=grid, score=vsa.SubBlocks(4))
    torch.testing.assert_close(parts.recall[1], chosen.recall(q, k))


def test_products_of_runs_are_counted() -> None:
    mean, parts = (vsa.flops(GRID, 2, 16, 3, score=each) for each in ("mean", vsa.SubBlocks(4)))
    assert parts.select == 16 * mean.select
    assert (parts.coarse, parts.fine, parts.full) == (mean.coarse, mean.fine, mean.full)


def test_compiled_calls_are_one_graph_for_each_score() -> None:
    q, k, v = torch.randn(3, 1, *GRID, 2, 16).unbind()
    compiled = torch.compile(vsa.attention, fullgraph=True, backend="eager")
    for score in ("mean", vsa.SubBlocks(4)):
        out = compiled(q, k, v, 3, score=score)
        torch.testing.assert_close(out, vsa.attention(q, k, v, 3, score=score))


def test_forward_mode_chooses_alike() -> None:
    q, k, v = torch.randn(3, 1, *GRID, 2, 16).double().unbind()
    score = vsa.SubBlocks(4)

    def attend(x: Tensor) -> Tensor:
        return vsa.attention(x, k, v, 3, score=score)

    tangent = torch.randn_like(q)
    out, of_out = torch.func.jvp(attend, (q,), (tangent,))
    torch.testing.assert_close(out, attend(q))
    step = 1e-6
    around = attend(q + step * tangent) - attend(q - step * tangent)
    torch.testing.assert_close(of_out, around / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_the_operator_is_one_that_pytorch_can_follow(backend: str) -> None:
    if (missing := BACKENDS[backend].why_not(Request("cpu"))) is not None:
        pytest.skip(missing)
    q, k = torch.randn(2, 1, 120, 2, 64).bfloat16().unbind()
    grid = vsa.Grid((4, 5, 6)).as_ints()
    arguments = (q, k, None, [2], 0.0, None, grid, grid, 4, 0.125, backend, [], None, [])
    torch.library.opcheck(torch.ops.vsa.select_by_sub_blocks, arguments)
