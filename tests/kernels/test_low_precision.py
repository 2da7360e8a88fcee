# SPDX-License-Identifier: Apache-2.0
"""The forward of int8 and fp8, emulated and on a Hopper GPU, against its simulation and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.machines import backend_on, machine_of, on_both
from torch import Tensor

import vsa
from vsa.backends.kernels import head_slices, low_precision
from vsa.backends.kernels.calls import axis_call
from vsa.backends.kernels.machine import Emulator
from vsa.stages import eager
from vsa.verify.low_precision import OUT as ALLOWED
from vsa.verify.low_precision import SIMULATION as NEAR
from vsa.verify.low_precision import Case, exact
from vsa.verify.parity import PROBLEMS, Problem, by_name

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

precisions = pytest.mark.parametrize("precision", ["int8", "fp8"])


def error(out: Tensor, truth: Tensor) -> float:
    out, truth = out.double().cpu(), truth.double().cpu()
    return ((out - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def attend(
    machine: str, *tensors: Any, precision: str = "int8", **options: Any
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp on the CPU, by our own kernels."""

    def there(x: Any) -> Any:
        return x.to(machine) if isinstance(x, (Tensor, vsa.Selection)) else x

    tensors = tuple(map(there, tensors))
    options = {name: there(x) for name, x in options.items()}
    name = backend_on(machine).name
    options |= {"precision": precision, "return_lse": True, "backend": name}
    with eager.paused():  # prepared calls: tests/python/test_plans_precision.py
        found = vsa.attention(*tensors, **options)
    return tuple(x.cpu() for x in found)


def simulated(*tensors: Any, precision: str = "int8", **options: Any) -> tuple[Any, ...]:
    return vsa.attention(*tensors, precision=precision, return_lse=True, backend="torch", **options)


def draw(grid: vsa.Grid, heads: int, kv_heads: int, head_dim: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, grid.length, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return [q, k + 3 * torch.randn(head_dim, generator=generator).bfloat16(), v]


KINDS = [
    by_name(problem.name, head_dim=head_dim, dtype=dtype)
    for problem in PROBLEMS
    if problem.magnitude == 1 and problem.name != "scale" and not problem.tail
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float16))
]


@on_both
@precisions
@pytest.mark.parametrize("problem", KINDS, ids=lambda x: f"{x.name}-{x.head_dim}")
def test_all_kinds_of_calls_are_near_fp64_and_their_simulation(
    problem: Problem, machine: str, precision: str
) -> None:
    tensors = problem.inputs()
    names = [name for name in tensors if not name.startswith("upstream")]
    q, k, v = (tensors[name] for name in names[:3])
    options = {name: tensors[name] for name in names[3:]} | {
        "grid": problem.query_grid,
        "kv_grid": problem.key_grid,
        "scale": problem.scale,
        "text_valid": problem.valid(),
        "precision": precision,
    }
    out, lse = attend(machine, q, k, v, problem.topk, **options)
    expected, chosen, expected_lse = simulated(
        q, k, v, problem.topk, return_selection=True, **options
    )
    assert error(out, expected) < NEAR[precision]
    assert error(out, exact(Case(problem), chosen)[0]) <= ALLOWED[precision]
    nothing = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (lse - expected_lse)[~nothing].abs().max() < 0.04


@on_both
@precisions
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kept", [1, 9, 40])
def test_error_is_as_small_as_promised(machine, precision, head_dim, kept) -> None:
    grid = vsa.Grid((4, 4, 4 * 40))
    q, k, v = draw(grid, 1, 1, head_dim)
    few = vsa.Grid((4, 4, 8))
    q = q[:, : few.length]
    selection = vsa.select(q, k, kept, grid=few, kv_grid=grid)
    out, lse = attend(machine, q, k, v, None, selection=selection, precision=precision)
    truth, truth_lse = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, return_lse=True
    )
    assert error(out, truth) <= ALLOWED[precision]
    assert (lse - truth_lse).square().mean().sqrt() < 0.02


@on_both
@precisions
def test_long_rows_of_equal_weights_are_not_cut_short(machine, precision) -> None:
    grid = vsa.Grid((4, 4, 4 * 100))
    q, k, v = draw(grid, 1, 1, 64)
    few = vsa.Grid((4, 4, 4))
    q = torch.zeros_like(q[:, : few.length])
    out, lse = attend(machine, q, k, v + 1, 1.0, grid=few, kv_grid=grid, precision=precision)
    assert (lse - torch.tensor(float(grid.length)).log()).abs().max() < 2e-3
    assert error(out, (v + 1).double().mean(1, keepdim=True).expand_as(out)) < 5e-3


@on_both
def test_heads_in_slices_give_the_same_bits(machine, monkeypatch) -> None:
    grid = vsa.Grid((4, 8, 12), prefix=5)
    q, k, v = draw(grid, 6, 3, 64, batch=2)
    expected = attend(machine, q, k, v, 2, grid=grid)
    monkeypatch.setattr(head_slices, "MOST_HELD", 0.0)
    for found, wanted in zip(attend(machine, q, k, v, 2, grid=grid), expected, strict=True):
        assert torch.equal(found, wanted)


def test_tiles_held_at_a_time_are_at_most_15_percent_of_the_inputs(monkeypatch) -> None:
    grid = vsa.Grid((4, 8, 8))
    q, k, v = draw(grid, 12, 12, 64)
    held, made = [], low_precision.quantise_call

    def watched(*args: Any) -> Any:
        held.append(args[1].images)
        return made(*args)

    monkeypatch.setattr(low_precision, "quantise_call", watched)
    attend("cpu", q, k, v, 2, grid=grid)
    given = sum(x.numel() * x.element_size() for x in (q, k, v))
    assert len(held) == 3 and max(images.numel() for images in held) <= 0.15 * given
    assert len({images.data_ptr() for images in held}) == 1  # each in the place of the one before


@on_both
def test_a_launch_clears_the_counters_of_all_slices(machine) -> None:
    bitmap = torch.ones(1, 3, 8, 1, dtype=torch.int32, device=machine)
    axes = torch.empty(1, 3, dtype=torch.int32, device=machine)
    counters = torch.ones(2500, dtype=torch.int32, device=machine)
    machine_of(machine).run(axis_call(bitmap, axes, (2, 2, 2), counters), bitmap.device)
    assert not counters.any()


def test_every_schedule_gives_the_same_bits(monkeypatch) -> None:
    grid = vsa.Grid((4, 8, 20))
    q, k, v = draw(grid, 2, 1, 64)
    backend = backend_on("cpu")
    results = []
    for seed in range(4):
        monkeypatch.setattr(backend, "machine", Emulator(blocks=1 + seed % 2, seed=seed))
        results.append(attend("cpu", q, k, v, 4, grid=grid))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@on_both
def test_views_give_the_bits_of_copies(machine) -> None:
    grid = vsa.Grid((4, 8, 8))
    q, k, v = draw(grid, 2, 2, 64)
    expected = attend(machine, q, k, v, 2, grid=grid)
    fused = torch.stack((q, k, v), dim=2)
    outside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in (fused.unbind(2), outside):
        for found, wanted in zip(attend(machine, *views, 2, grid=grid), expected, strict=True):
            assert torch.equal(found, wanted)


@on_both
@precisions
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_infinity_and_nan_reach_what_they_reach_in_the_simulation(
    machine, precision, value, where
) -> None:
    grid = vsa.Grid((4, 8, 16))
    tensors = dict(zip("qkv", draw(grid, 2, 2, 64), strict=True))
    selection = vsa.select(tensors["q"], tensors["k"], 3, grid=grid)
    tensors[where][0, 300, 1, 5] = value
    options = {"selection": selection, "precision": precision}
    out, lse = attend(machine, *tensors.values(), None, **options)
    expected, expected_lse = simulated(*tensors.values(), None, **options)
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())


@on_both
def test_rows_that_attend_nothing_are_zeros_beside_nan(machine) -> None:
    grid = vsa.Grid((4, 4, 16))
    q, k, v = draw(grid, 1, 1, 64)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1, 2] = True
    selection = vsa.Selection.from_mask(mask)
    tiles = grid.to_tiles(torch.arange(grid.length).view(1, -1, 1, 1))[0, ..., 0, 0]
    for x, tile in ((q, 0), (k, 3), (v, 0)):
        x[0, tiles[tile]] = torch.nan
    out, lse = attend(machine, q, k, v, None, grid=grid, selection=selection)
    attends = torch.zeros(grid.length, dtype=torch.bool)
    attends[tiles[1]] = True
    assert (out[0, ~attends] == 0).all() and (lse[..., ~attends] == -torch.inf).all()
    assert out[0, attends].isfinite().all() and lse[..., attends].isfinite().all()


@on_both
@pytest.mark.parametrize("factor", [1e2, 1e5, 1e15])
def test_large_scores_of_int8_take_the_value_of_the_largest(machine, factor) -> None:
    grid = vsa.Grid((4, 4, 16))
    q, k, v = draw(grid, 1, 1, 64)
    out, _ = attend(machine, q * factor, k, v, 3, grid=grid)
    expected, _ = simulated(q * factor, k, v, 3, grid=grid)
    assert out.isfinite().all() and error(out, expected) < 0.1


@on_both
@pytest.mark.parametrize("factor", [10, 1e3, 1e15])
def test_large_scores_of_fp8_stay_numbers(machine, factor) -> None:
    grid = vsa.Grid((4, 4, 16))
    q, k, v = draw(grid, 1, 1, 64)
    out, _ = attend(machine, q * factor, k, v, 3, grid=grid, precision="fp8")
    # Halves are too coarse to say which of the largest scores is larger: some values' mean.
    assert out.isfinite().all() and out.abs().max() <= v.abs().max() * 1.01
    assert out.std() > 0.5


@on_both
@precisions
@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.3])
def test_any_scale(machine, precision, scale) -> None:
    grid = vsa.Grid((4, 4, 16))
    q, k, v = draw(grid, 1, 1, 128)
    options = {"grid": grid, "scale": scale, "precision": precision}
    out, lse = attend(machine, q, k, v, 3, **options)
    expected, expected_lse = simulated(q, k, v, 3, **options)
    assert error(out, expected) < NEAR[precision]
    assert (lse - expected_lse).abs().max() < (0.05 if precision == "int8" else 0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
def test_a_cuda_graph_replays_it() -> None:
    grid = vsa.Grid((4, 8, 12))
    q, k, v = (x.cuda() for x in draw(grid, 4, 2, 128))
    expected = vsa.attention(q, k, v, 3, grid=grid, precision="int8")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = vsa.attention(q, k, v, 3, grid=grid, precision="int8")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
