# SPDX-License-Identifier: Apache-2.0
"""Tile means and the choice of tiles: the kernels' source against PyTorch and the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import MACHINES, backend_on, machine_of, on_both
from torch import Tensor

import vsa
from vsa.backends import BACKENDS, torch_coarse, torch_kept_tiles
from vsa.backends.kernels import coarse_select
from vsa.operators import coarse_select as ops
from vsa.values import bitmap, budget
from vsa.values.problem import TileScores
from vsa.verify import reference
from vsa.verify.parity import by_name, expected, worst

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

ELEMENTS = [torch.bfloat16, torch.float16, torch.float32]


# ---- selection ----------------------------------------------------------------------------------


def select_rows(
    machine: str,
    scores: Tensor,
    must: Tensor | None,
    counts: list[int],
    mass: float,
    tiles: int,
    first: int = 0,
) -> Tensor:
    """By the kernel or its source: (rows, columns) -> bool."""
    words = torch.full(
        (len(scores), bitmap.num_words(scores.shape[1])), -1, dtype=torch.int32, device=machine
    )
    forced = None if must is None else bitmap.pack(must).to(machine)
    coarse_select.select_rows(
        machine_of(machine),
        scores.to(machine).contiguous(),
        forced,
        counts,
        mass,
        tiles,
        first,
        words,
    )
    columns = words.shape[1] * bitmap.WORD_BITS
    found = bitmap.unpack(words.cpu(), columns)
    assert not found[:, scores.shape[1] :].any(), "spare bits must be zero"
    return found[:, : scores.shape[1]]


def rows_by_pytorch(
    scores: Tensor, must: Tensor | None, counts: list[int], mass: float, tiles: int, first: int
) -> Tensor:
    row = torch.arange(first, first + len(scores))
    least = torch.tensor(counts)[row // tiles % len(counts)][:, None]
    forced = None if must is None else must[row % tiles]
    return torch_kept_tiles.kept_tiles(scores, forced, least, max(counts), mass)


SCORES = {
    "normal": lambda *shape: torch.randn(shape),
    "ties": lambda *shape: torch.randn(shape).round(),
    "zeros": lambda *shape: torch.randn(shape).round().clamp(-1, 0) * 0.0,
    "huge": lambda *shape: torch.randn(shape) * torch.randn(shape).mul(20).exp(),
    "tiny": lambda *shape: torch.randn(shape) * 1e-42,
    "spread": lambda *shape: torch.randn(shape) * 20,
    "constant": lambda *shape: torch.tensor([-0.0, 2.5, -torch.inf])[
        torch.randint(3, (1, 1))
    ].expand(shape),
    "outlier": lambda *shape: torch.randn(shape).index_fill(1, torch.tensor([0]), 3e38),
    "special": lambda *shape: torch.randn(shape).masked_scatter(
        torch.rand(shape) < 0.5,
        torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0]).repeat(shape[0] * shape[1]),
    ),
}


@st.composite
def selections(draw):
    """Scores, forced tiles, counts, mass, and where the rows stand among all."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tiles, heads, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    columns = draw(st.integers(1, 70) | st.sampled_from([255, 256, 257, 513, 1100, 2049]))
    scores = SCORES[draw(st.sampled_from(sorted(SCORES)))](tiles * heads * batch, columns)
    density = draw(st.sampled_from([None, 0.0, 0.1, 1.0]))
    must = None if density is None else torch.rand(tiles, columns) < density
    number = st.integers(1, columns)
    counts = draw(st.lists(number, min_size=1, max_size=1) | st.lists(
        number, min_size=heads, max_size=heads))  # fmt: skip
    mass = draw(st.just(0.0) | st.floats(0.01, 1.0))
    return scores, must, counts, mass, tiles, draw(st.sampled_from([0, tiles, 5]))


@on_both
@given(case=selections())
@settings(max_examples=250, deadline=None)
def test_kernel_and_pytorch_choose_the_same_tiles(case, machine: str) -> None:
    assert torch.equal(select_rows(machine, *case), rows_by_pytorch(*case))


@on_both
@pytest.mark.parametrize("mass", [0.0, 0.8])
@pytest.mark.parametrize("columns", [*range(64, 2100, 127), 2048, 2049, 4096, 16384])
def test_every_length_of_a_row(columns: int, mass: float, machine: str) -> None:
    scores = torch.randn(3, columns) * 3
    must = torch.rand(3, columns) < 0.01
    for forced in (None, must):
        case = scores, forced, [1 + columns // 8], mass, 3, 0
        assert torch.equal(select_rows(machine, *case), rows_by_pytorch(*case))


@given(
    scores=st.lists(st.sampled_from([-2.0, -0.5, -0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=70),
    topk=st.integers(1, 70) | st.floats(0.01, 1.0),
    mass=st.sampled_from([0.0, 0.3, 0.7, 0.99]),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_cut_where_the_reference_cuts_them(
    scores: list[float], topk: float, mass: float
) -> None:
    count = budget.resolve(topk, len(scores), 1).counts[0]
    rows = torch.tensor([scores])
    found = select_rows("cpu", rows, None, [count], mass, 1)
    # A mass that is hit to a hair may be reached a tile earlier or later in fp64.
    nudges = (-3e-6, 0, 3e-6) if mass else (0,)
    truths = [reference.best(scores, topk, mass + nudge) for nudge in nudges]
    assert found[0].nonzero().flatten().tolist() in truths


def test_forced_tiles_go_before_infinite_scores() -> None:
    scores = torch.tensor([[1.0, torch.inf, 3.0, torch.inf, 2.0]])
    must = torch.tensor([[True, False, False, False, False]])
    for count, kept in ((1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3])):
        case = scores, must, [count], 0.0, 1, 0
        for found in (select_rows("cpu", *case), rows_by_pytorch(*case)):
            assert found[0].nonzero().flatten().tolist() == kept


def test_scores_are_in_full_precision_whatever_the_process_allows() -> None:
    q, k = torch.randn(1, 2, 50, 64), torch.randn(1, 2, 400, 64)
    before = ops.select_tiles(q, k, None, [50], 0.0, None, 0.125, "torch", [], None, [])
    torch.set_float32_matmul_precision("medium")
    allowed = torch.backends.mkldnn.matmul.fp32_precision
    try:
        assert torch.equal(
            before, ops.select_tiles(q, k, None, [50], 0.0, None, 0.125, "torch", [], None, [])
        )
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision("highest")


def test_slices_of_scores_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 6, 40, 16), torch.randn(2, 3, 70, 16)
    must = torch.rand(40, 70) < 0.05
    counts = [5, 9, 20, 1, 70, 33]
    for mass in (0.0, 0.6):
        scores = TileScores(q, k, must, counts, mass, None, 0.3, "torch")
        whole = ops.select_tiles(*scores)
        for size in (1, 3000, 40000):
            monkeypatch.setattr(torch_coarse, "SCORE_BYTES", size)
            monkeypatch.setattr(torch_coarse, "SORT_BYTES", size)
            monkeypatch.setattr(coarse_select, "SCORE_BYTES", size)
            for backend in ("torch", "emulated"):
                assert torch.equal(whole, ops.select_tiles(*scores._replace(backend=backend)))
        monkeypatch.undo()


def test_all_of_the_mass_is_all_tiles_but_those_of_no_weight() -> None:
    scores = torch.tensor([[0.0, -22.1, -22.3, -1000.0, -torch.inf]])
    case = scores, None, [1], 1.0, 1, 0
    for found in (select_rows("cpu", *case), rows_by_pytorch(*case)):
        assert found.tolist() == [[True, True, False, False, False]]


def test_forced_tiles_count_towards_the_mass() -> None:
    scores = torch.tensor([[4.0, 3.9, 0.0, 0.0, 0.0, 0.0]])
    must = torch.tensor([[False, True, False, False, True, False]])
    case = scores, must, [1], 0.4, 1, 0
    for found in (select_rows("cpu", *case), rows_by_pytorch(*case)):
        assert found.tolist() == must.tolist()


@pytest.mark.parametrize("name", ["mass", "per-head"])
def test_kernel_source_makes_the_choice_of_the_reference(name: str) -> None:
    problem = by_name(name, dtype=torch.float32)
    tensors = problem.inputs()
    _, mask = expected(problem, tensors)
    grid, heads = problem.query_grid, problem.heads
    own = budget.resolve(problem.topk, grid.num_tiles, heads)
    emulated = BACKENDS["emulated"]
    q_means, k_means = emulated.tile_means([tensors["q"], tensors["k"]], [grid, grid])
    scores = TileScores(q_means, k_means, None, own.counts, own.mass, None, 0.25, "emulated")
    words, _ = emulated.select(scores)
    assert torch.equal(bitmap.unpack(words, grid.num_tiles), mask)


# ---- on the device ------------------------------------------------------------------------------


@on_both
def test_operators_run_the_kernels_of_their_backend(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, runs = backend_on(machine), []
    run = backend.machine.run
    monkeypatch.setattr(
        backend.machine, "run", lambda call, device: (runs.append(call), run(call, device))
    )
    grid = vsa.Grid((5, 6, 9), prefix=2)
    q, k, v = torch.randn(3, 2, grid.length, 4, 64, device=machine).bfloat16()
    found, selection = vsa.attention(
        q, k, v, 3, grid=grid, gate_coarse=torch.ones_like(q), backend=backend.name,
        return_selection=True,
    )  # fmt: skip
    assert {type(call).__name__ for call in runs} >= {"TileMeans", "SelectTiles", "FineForward"}
    runs.clear()
    plain, chosen = vsa.attention(
        q, k, v, 3, grid=grid, gate_coarse=torch.ones_like(q), backend="torch",
        return_selection=True,
    )  # fmt: skip
    assert not runs
    assert torch.equal(selection.bitmap, chosen.bitmap)
    assert worst(found.float(), plain.double()) < 0.02
    again = vsa.select(q, k, 3, grid=grid, backend=backend.name)
    assert runs and torch.equal(again.bitmap, selection.bitmap)


@on_both
def test_what_the_kernels_do_not_take_goes_another_way(machine: str) -> None:
    x = torch.randn(1, 64, 1, 8, device=machine)
    assert coarse_select.can_mean([x, x.clone()])
    assert not coarse_select.can_mean([x.double()])
    assert not coarse_select.can_mean([x, x.bfloat16()])
    assert not coarse_select.can_mean([x, x[..., :4]])
    assert not coarse_select.can_mean([x[..., ::2]])
    scores = TileScores(x, x, None, [1] * 256, 0.0, None, 1.0, "hopper")
    assert coarse_select.can_select(scores)
    assert not coarse_select.can_select(scores._replace(topk=[1] * 257))
    assert not coarse_select.can_select(scores._replace(q_means=x.double()))


@pytest.mark.parametrize("topk", [0.2, vsa.TopP(0.7, 0.1), (3, 0.1, 7)], ids=str)
@pytest.mark.parametrize("machine", MACHINES[1:])
def test_captured_in_a_cuda_graph_without_waiting(topk: budget.TopK, machine: str) -> None:
    q, k = torch.randn(2, 2, 9, 10, 11, 3, 64, device=machine).bfloat16()
    must = torch.rand(27, 27, device=machine) < 0.1

    def run() -> list[Tensor]:
        return [vsa.select(q, k, topk).bitmap, vsa.select(q, k, topk, must=must).bitmap]

    run()  # cuBLAS makes its workspace
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [x.clone() for x in run()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("machine", MACHINES[1:])
def test_gpu_and_cpu_choose_the_same_on_identical_scores(machine: str) -> None:
    scores = torch.randn(3000, 1440) * 3
    for mass in (0.0, 0.9):
        case = scores, None, [180, 20, 1], mass, 1000
        assert torch.equal(select_rows(machine, *case), select_rows("cpu", *case))
