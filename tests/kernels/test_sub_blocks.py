# SPDX-License-Identifier: Apache-2.0
"""Means of runs, and the scores of tiles by them: source on a CPU, kernels on a Hopper GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import backend_on, machine_of, on_both
from torch import Tensor

import vsa
from vsa.backends.kernels import sub_blocks
from vsa.backends.kernels.sub_blocks import Rows
from vsa.stages import eager
from vsa.values import bitmap
from vsa.values.grid import SLOTS
from vsa.values.problem import SubBlockScores
from vsa.verify import dense, reference

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

ELEMENTS = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Queries and keys, and the runs of their tiles."""

    grid: vsa.Grid
    kv_grid: vsa.Grid
    runs: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    scale: float = 0.25
    element: torch.dtype = torch.bfloat16
    magnitude: float = 1.0

    def tensors(self, machine: str, seed: int = 0) -> tuple[Tensor, Tensor]:
        """q and k, with NaN where no token of a tile is."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for grid, heads in ((self.grid, self.heads), (self.kv_grid, self.kv_heads)):
            shape = self.batch, grid.length, heads, self.head_dim
            x = torch.randn(shape, generator=generator) * self.magnitude
            x[:, : grid.prefix] = math.nan
            x[:, grid.length - grid.suffix :] = math.nan
            found.append(x.to(self.element).to(machine))
        return found[0], found[1]

    def asked(self, q: Tensor, k: Tensor, machine: str, topk: int = 2) -> SubBlockScores:
        """What the operator is given."""
        grids = self.grid.as_ints(), self.kv_grid.as_ints()
        name = backend_on(machine).name
        return SubBlockScores(q, k, None, [topk], 0.0, None, *grids, self.runs, self.scale, name)


def parts_of(grid: vsa.Grid, runs: int) -> Tensor:
    return dense.tiles_in_runs(grid.shape, grid.box, grid.prefix, grid.suffix, runs)


def scored(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """True scores (B, heads, n_q, n_k) of the numbers as they are, and how far off ours may be."""
    q, k = (x.double().nan_to_num(0).transpose(1, 2).cpu() for x in (q, k))
    k = k.repeat_interleave(case.heads // case.kv_heads, dim=1)
    parts = parts_of(case.grid, case.runs), parts_of(case.kv_grid, case.runs)
    truth = dense.sub_block_scores(q, k, parts, case.scale)
    return truth, dense.sub_block_bound(q, k, parts, case.scale)


def kernel_scores(case: Case, q: Tensor, k: Tensor, machine: str) -> Tensor:
    """What the kernels write where scores lie, (B, heads, n_q, n_k)."""

    def empty(shape, dtype):  # poisoned: what nobody has written must reach nothing
        return torch.full(tuple(shape), math.nan, dtype=dtype, device=machine)

    matrices, tiles = case.batch * case.kv_heads, case.grid.num_tiles
    columns = case.kv_grid.num_tiles
    queries = sub_blocks.rows_of_queries(q, matrices, tiles, case.runs, empty)
    keys = sub_blocks.rows_of_keys(k, columns, case.runs, empty)
    call = sub_blocks.run_means_call(
        (q, k), (case.grid, case.kv_grid), (queries, keys), (), case.runs
    )
    machine_of(machine).run(call, q.device)
    rows = case.batch * case.heads * tiles
    scores = empty((rows, columns), torch.float32)
    words = torch.empty(rows, bitmap.num_words(columns), dtype=torch.int32, device=machine)
    of = sub_blocks.RunChoice(
        queries,
        keys,
        columns,
        sub_blocks.has_empty((case.grid, case.kv_grid), case.runs),
        case.scale,
        None,
        [1],
        0.0,
        tiles,
    )
    for each in sub_blocks.choice_calls(of, scores.flatten(), words, 64 << 20):
        machine_of(machine).run(each, q.device)
    return scores.cpu().view(case.batch, case.heads, tiles, columns)


@st.composite
def cases(draw) -> Case:
    tile = draw(st.sampled_from([(4, 4, 4), (3, 5, 4), (1, 2, 3), (1, 1, 2), (2, 4, 8)]))
    prefix, suffix = draw(st.sampled_from([(0, 0), (3, 2)]))
    shapes = [draw(st.tuples(*[st.integers(1, 6)] * 3)) for _ in range(2)]
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    return Case(
        *(vsa.Grid(shape, tile, prefix, suffix) for shape in shapes),
        runs=draw(st.integers(2, 16)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128])),
        batch=draw(st.integers(1, 2)),
        scale=draw(st.sampled_from([0.25, -0.125])),
        element=draw(st.sampled_from(ELEMENTS)),
        magnitude=draw(st.sampled_from([1.0, 16.0, 1e-3])),
    )


@on_both
@given(case=cases(), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_scores_lie_within_their_bound_of_fp64(case: Case, seed: int, machine: str) -> None:
    q, k = case.tensors(machine, seed)
    truth, bound = scored(case, q, k)
    assert ((kernel_scores(case, q, k, machine).double() - truth).abs() <= bound).all()


SHAPES = [
    Case(vsa.Grid((8, 12, 12)), vsa.Grid((8, 12, 12)), 4),
    Case(vsa.Grid((8, 12, 12)), vsa.Grid((4, 12, 20)), 4, heads=4, kv_heads=2, head_dim=128),
    Case(vsa.Grid((5, 6, 7)), vsa.Grid((5, 6, 7)), 8, batch=2),
    Case(vsa.Grid((5, 6, 9)), vsa.Grid((9, 6, 7), prefix=5), 13, head_dim=128),
    Case(vsa.Grid((1, 1, 300), (1, 1, 1)), vsa.Grid((1, 1, 300), (1, 1, 2)), 3, 1, 1),
    Case(vsa.Grid((2, 3, 3)), vsa.Grid((2, 40, 40)), 2, element=torch.float16),
]


@on_both
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("case", SHAPES, ids=range(len(SHAPES)))
def test_choices_are_right_but_for_ties_within_the_bound(
    case: Case, topk: int, machine: str
) -> None:
    q, k = case.tensors(machine)
    asked = case.asked(q, k, machine, topk)
    assert sub_blocks.can_score(asked)
    words, means, coarse = backend_on(machine).select_by_sub_blocks(asked)
    assert means == [] and coarse is None
    chosen = bitmap.unpack(words.cpu(), case.kv_grid.num_tiles)
    truth, bound = scored(case, q, k)
    count = torch.tensor(min(topk, case.kv_grid.num_tiles))
    assert dense.within(chosen, truth, bound, count, 0.0).all()
    assert (chosen != dense.choice(truth, topk)).float().mean() < 0.02


def test_a_choice_beyond_the_bound_is_not_allowed() -> None:
    scores, bound = torch.tensor([3.0, 2.0, 1.0]), torch.full((3,), 0.1)

    def is_allowed(row: str, count: int, mass: float = 0.0, wider: float = 0.0) -> bool:
        kept = torch.tensor([mark == "x" for mark in row])
        found = dense.within(kept, scores, bound + wider, torch.tensor(count), mass)
        return bool(found)

    assert [is_allowed(row, 1) for row in ("x..", ".x.", "xx.")] == [True, False, False]
    assert is_allowed(".x.", 1, wider=0.5) and not is_allowed("x.x", 2)
    # Shares of 0.665, 0.245 and 0.090.
    assert [is_allowed(row, 1, 0.3) for row in ("x..", "xx.", "xxx")] == [True, False, False]
    assert [is_allowed(row, 1, 0.7) for row in ("x..", "xx.", "xxx")] == [True, True, False]
    assert not is_allowed("x..", 1, 0.95) and not is_allowed("x..", 2, 0.3)


@on_both
@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("runs", [3, 4, 16])
def test_means_of_tiles_keep_their_bits(
    runs: int, head_dim: int, element: torch.dtype, machine: str
) -> None:
    grid, kv_grid = vsa.Grid((5, 6, 7), prefix=2), vsa.Grid((3, 9, 10), (2, 4, 5))
    q = torch.randn(2, grid.length, 4, head_dim).to(element).to(machine)
    k, v = torch.randn(2, 2, kv_grid.length, 2, head_dim).to(element).to(machine).unbind()
    backend = backend_on(machine)
    case = Case(grid, kv_grid, runs, 4, 2, head_dim, 2, element=element)
    asked = case.asked(q, k, machine)
    words, means, coarse = backend.select_by_sub_blocks(asked, v)
    assert torch.equal(words, backend.select_by_sub_blocks(asked)[0])
    for found, alone in zip(
        means, backend.tile_means((q, k, v), (grid, kv_grid, kv_grid)), strict=True
    ):
        assert torch.equal(found, alone)
    q_means, k_means, v_means = (x.double() for x in means)
    k_means, v_means = (x.repeat_interleave(2, 1) for x in (k_means, v_means))
    truth = (q_means @ k_means.mT * case.scale).softmax(-1) @ v_means
    torch.testing.assert_close(coarse.double(), truth, rtol=1e-5, atol=1e-5)


@on_both
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat((x, x, x), 2)[:, :, :4],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (0, 3))[..., :64],
        lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    ],
    ids=["fused", "heads-first", "odd-strides", "misaligned", "every-other-head"],
)
def test_scores_do_not_depend_on_where_values_lie(view, machine: str) -> None:
    grid = vsa.Grid((5, 6, 7), prefix=2)
    case = Case(grid, grid, 5, 4, 4, batch=2)
    q, k = case.tensors(machine)
    assert not view(q).is_contiguous()
    plain = kernel_scores(case, q, k, machine)
    assert torch.equal(kernel_scores(case, view(q), view(k), machine), plain)


def unpacked(rows: Rows, tiles: int, slots: int, are_keys: bool) -> Tensor:
    """(matrices, tiles, slots, head_dim) fp64: the means that rows stand for, NaN if empty."""
    x, factors = rows.rows.double(), rows.factors.double()
    if are_keys:
        # csrc/kernels/coarse/run_layout.h: 64 rows of a block, eight chunks in a swizzle.
        matrices, blocks, _, head_dim = x.shape
        panels = x.view(matrices, blocks, head_dim // 64, 64, 8, 8)
        row, chunk = torch.arange(64)[:, None], torch.arange(8)
        panels = panels[:, :, :, row, chunk ^ row % 8]  # undone: it is its own inverse
        x = panels.permute(0, 1, 3, 2, 4, 5).reshape(matrices, blocks, 64, head_dim)
        quads, per_block = slots // 4, 64 // slots
        tile, slot = torch.arange(per_block)[:, None], torch.arange(slots)
        lane, quad = tile % 4, tile // 4 * quads + slot // 4
        at = 16 * quad + slot % 4 // 2 * 8 + 2 * lane + slot % 2
        x = x[:, :, at].flatten(1, 2)
        factors = factors[:, :, (quad * 4 + lane) * 4 + slot % 4].flatten(1, 2)
    empty = factors < 0
    assert (x[:, :tiles][empty[:, :tiles]] == 0).all()
    return (x * factors[..., None]).masked_fill(empty[..., None], math.nan)[:, :tiles]


@on_both
@pytest.mark.parametrize("runs", [2, 4, 7, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30, 1e-41])
def test_rows_are_the_means_of_runs_to_eleven_bits(
    runs: int, head_dim: int, magnitude: float, machine: str
) -> None:
    grid = vsa.Grid((5, 6, 11), prefix=1)
    x = (torch.randn(2, grid.length, 2, head_dim) * magnitude).bfloat16().to(machine)
    x[0, 3, 0] = 0

    def empty(shape, dtype):
        return torch.full(tuple(shape), math.nan, dtype=dtype, device=machine)

    queries = sub_blocks.rows_of_queries(x, 4, grid.num_tiles, runs, empty)
    keys = sub_blocks.rows_of_keys(x, grid.num_tiles, runs, empty)
    call = sub_blocks.run_means_call((x, x), (grid, grid), (queries, keys), (), runs)
    machine_of(machine).run(call, x.device)
    slots = sub_blocks.slots_of(runs)
    rows = [
        unpacked(Rows(*(y.cpu() for y in each)), grid.num_tiles, slots, are_keys)
        for each, are_keys in ((queries, False), (keys, True))
    ]
    assert torch.equal(rows[0], rows[1]) or torch.equal(*(y.nan_to_num(7) for y in rows))
    tiles = reference.tiles_of(grid.shape, grid.tile, grid.prefix)
    tokens = x.double().cpu().transpose(1, 2).flatten(0, 1)
    for place, tile in enumerate(tiles):
        cut = reference.runs_of(tile, runs)
        means = torch.stack([tokens[:, run].mean(1) for run in cut], dim=1)
        found = rows[0][:, place]
        assert found[:, len(cut) :].isnan().all()
        largest = means.abs().amax(-1, keepdim=True)
        off = (found[:, : len(cut)] - means).abs()
        assert (off <= 2**-11 * means.abs() + 2**-38 * largest + 2e-45).all()


@on_both
def test_a_scale_of_zero_and_infinite_tokens(machine: str) -> None:
    grid = vsa.Grid((5, 6, 7))
    case = Case(grid, grid, 4)
    q, k = case.tensors(machine)
    for scale in (0.0, 1e-50, -1e200):
        assert not sub_blocks.can_score(case.asked(q, k, machine)._replace(scale=scale))
    x = q.unflatten(1, grid.shape), k.unflatten(1, grid.shape)
    options = {"score": vsa.SubBlocks(4), "backend": backend_on(machine).name}
    tied = vsa.select(*x, 2, scale=0.0, **options).mask().cpu()
    # Equal products: the most pairs of runs win, and all tiles here have four.
    assert tied[..., :2].all() and not tied[..., 2:].any()
    k[0, 0] = math.nan
    chosen = vsa.select(*x, 7, **options).mask()
    assert not chosen[..., 0].any() and (chosen.sum(-1) == 7).all()


@on_both
def test_forced_tiles_budgets_of_heads_and_mass(machine: str) -> None:
    grid, kv_grid = vsa.Grid((5, 6, 7)), vsa.Grid((5, 6, 17))
    case = Case(grid, kv_grid, 4, 4, 2, batch=2)
    q, k = case.tensors(machine)
    must = torch.rand(grid.num_tiles, kv_grid.num_tiles, device=machine) < 0.2
    for topk, forced in ((3, must), ((1, 2, 3, 0.5), None), (vsa.TopP(0.6, floor=2), must)):
        found, plain = (
            vsa.select(
                q,
                k,
                topk,
                grid=grid,
                kv_grid=kv_grid,
                must=forced,
                score=vsa.SubBlocks(4),
                backend=backend,
            ).mask()
            for backend in (backend_on(machine).name, "torch")
        )
        assert forced is None or found[:, :, forced].all()
        assert (found != plain).float().mean() < 0.01


@on_both
def test_rows_in_slices_give_the_same_bits(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = vsa.Grid((5, 6, 17))
    case = Case(grid, grid, 4, 4, 2, batch=2)
    q, k = case.tensors(machine)
    v = torch.randn_like(k)
    backend, asked = backend_on(machine), case.asked(q, k, machine, 3)
    whole = backend.select_by_sub_blocks(asked, v)
    for most in (1, 20 * grid.num_tiles * 4, 70 * grid.num_tiles * 4):
        monkeypatch.setattr(sub_blocks, "SCORE_BYTES", most)
        words, means, coarse = backend.select_by_sub_blocks(asked, v)
        assert torch.equal(words, whole[0]) and torch.equal(coarse, whole[2])
        assert all(torch.equal(a, b) for a, b in zip(means, whole[1], strict=True))


@on_both
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_prepared_calls_give_the_bits_of_the_long_way(
    gated: bool, trained: bool, machine: str
) -> None:
    torch.manual_seed(0)
    name = backend_on(machine).name
    tensors = [x.bfloat16().to(machine) for x in torch.randn(4, 2, 5, 6, 7, 2, 64).unbind()]
    tensors = [x.requires_grad_(trained) for x in tensors]
    q, k, v, gate = tensors
    options = {"gate_coarse": gate} if gated else {}

    def attend(topk: float) -> list[Tensor]:
        out, chosen, lse = vsa.attention(
            q,
            k,
            v,
            topk,
            score=vsa.SubBlocks(4),
            backend=name,
            return_selection=True,
            return_lse=True,
            **options,
        )
        leaves = tensors if gated else tensors[:3]
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves) if trained else ()
        return [out, lse, chosen.bitmap, *grads]

    with eager.paused():
        long_way = attend(3)
    for _ in range(3):
        for found, wanted in zip(attend(3), long_way, strict=True):
            assert torch.equal(found, wanted)
    kinds = [plan for plan in eager._plans.values.values() if plan.backend == name]
    assert kinds and kinds[-1].prepared is not None


def test_calls_refuse_what_they_cannot_do() -> None:
    from vsa import _C

    grid = vsa.Grid((4, 4, 4))
    case = Case(grid, grid, 4)
    q, k = case.tensors("cpu")
    wrong = {
        "q": replace(case, grid=vsa.Grid((8, 4, 4))),
        "k": replace(case, kv_grid=vsa.Grid((8, 4, 4))),
    }
    for name, each in wrong.items():
        with pytest.raises(ValueError, match=f"^{name} must have the 128 tokens of its grid"):
            backend_on("cpu").select_by_sub_blocks(each.asked(q, k, "cpu"))
    assert _C.RUN_SLOTS == (4, 8, 16) and max(_C.RUN_SLOTS) <= SLOTS
    call = dict.fromkeys(_C.RunMeans.FIELDS, 1) | {"tensors": [], "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="RunMeans: slots must be one of"):
        _C.RunMeans(**call | {"head_dim": 64, "slots": 5})
    with pytest.raises(RuntimeError, match="one to three tensors"):
        _C.RunMeans(**call | {"head_dim": 64, "slots": 4}).emulate(1, 0)
