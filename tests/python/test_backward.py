# SPDX-License-Identifier: Apache-2.0
"""Gradients by the project's own kernels: one source, on the emulator and on a Hopper GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends import BACKENDS
from vsa.backends.kernels.backward import longest_first, transpose
from vsa.verify import parity
from vsa.verify.parity import PROBLEMS, Problem, by_name

ELEMENTS = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
Machine = tuple[str, str]


def _grads(
    machine: Machine,
    tensors: tuple[Tensor, Tensor, Tensor],
    selection: vsa.Selection,
    upstream: Tensor,
    upstream_lse: Tensor | None = None,
    text_valid: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> list[Tensor]:
    """dq, dk, dv of the fine stage on a machine."""
    backend, device = machine
    leaves = [x.to(device, dtype).detach().requires_grad_() for x in tensors]
    out, lse = vsa.block_sparse_attention(
        *leaves,
        selection.to(device),
        text_valid=None if text_valid is None else text_valid.to(device),
        return_lse=True,
        backend=backend,
        **options,
    )
    results, ups = [out], [upstream.to(out)]
    if upstream_lse is not None:
        results.append(lse)
        ups.append(upstream_lse.to(lse))
    return [grad.cpu() for grad in torch.autograd.grad(results, leaves, ups)]


def _true_grads(*arguments, **options) -> list[Tensor]:
    """The same in fp64 by PyTorch's own autograd."""
    return _grads(("torch", "cpu"), *arguments, dtype=torch.float64, **options)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_error_is_at_most_twice_that_of_sdpa(
    problem: Problem, head_dim: int, element: torch.dtype, machine: Machine
) -> None:
    problem = replace(problem, head_dim=head_dim, dtype=element)
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("volume", [1, 2, 3, 7, 12, 31, 47, 63, 64])
def test_every_tile_volume(volume: int, machine: Machine) -> None:
    problem = Problem(
        "volume", grid=(1, 1, 3 * volume + 1), tile=(1, 1, volume), topk=3, head_dim=64,
        heads=1, kv_heads=1, dtype=torch.bfloat16,
    )  # fmt: skip
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("head_dim", [64, 128])
def test_columns_from_nobody_to_everybody(head_dim: int, machine: Machine) -> None:
    """Key tiles that nobody, one or all select; query tiles that select one or nearly all."""
    grid = vsa.Grid((4, 12, 13))
    n = grid.num_tiles
    *tensors, upstream = torch.randn(4, 3, grid.length, 2, head_dim).bfloat16()
    mask = torch.rand(3, 2, n, n) < 0.3
    mask[:, :, 2], mask[:, :, 3] = False, True
    mask[..., 0], mask[..., 1] = False, True
    mask[0, 0, :, 5] = False
    mask[0, 0, 4, 5] = True
    selection = vsa.Selection.from_mask(mask, grid)
    found = _grads(machine, tensors, selection, upstream)
    true = _true_grads(tensors, selection, upstream)
    for x, truth in zip(found, true, strict=True):
        assert parity.error(x, truth) < 0.005
    nobody = grid.tile_of_token() == 0
    assert found[1][:, nobody].abs().max() == 0 and found[2][:, nobody].abs().max() == 0


def test_nothing_selected_at_all_gives_zeros(machine: Machine) -> None:
    grid = vsa.Grid((4, 5, 9))
    *tensors, upstream = torch.randn(4, 1, grid.length, 1, 64).half()
    n = grid.num_tiles
    selection = vsa.Selection.from_mask(torch.zeros(1, 1, n, n, dtype=torch.bool), grid)
    assert all(x.abs().max() == 0 for x in _grads(machine, tensors, selection, upstream))


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale: float, machine: Machine) -> None:
    grid = vsa.Grid((5, 6, 7))
    *tensors, upstream = torch.randn(4, 1, grid.length, 2, 64).bfloat16()
    selection = vsa.select(*tensors[:2], 3, grid=grid)
    found = _grads(machine, tensors, selection, upstream, scale=scale)
    true = _true_grads(tensors, selection, upstream, scale=scale)
    for x, truth in zip(found, true, strict=True):
        assert truth.norm() == 0 == x.norm() or parity.error(x, truth) < 0.01


@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_the_gradient_of_the_log_sum_exp(magnitude: float, machine: Machine) -> None:
    grid = vsa.Grid((5, 6, 7), suffix=3)
    *tensors, upstream = torch.randn(4, 2, grid.length, 2, 128).half()
    tensors[0] *= magnitude
    upstream_lse = torch.randn(2, 2, grid.length)
    selection = vsa.select(*tensors[:2], 3, grid=grid)
    arguments = tensors, selection, upstream, upstream_lse
    for x, truth in zip(_grads(machine, *arguments), _true_grads(*arguments), strict=True):
        assert parity.error(x, truth) < 0.002


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced-heads": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "sliced-tokens": lambda x: functional.pad(x, (0, 0, 0, 0, 3, 0))[:, 3:],
    "odd-strides": lambda x: functional.pad(x, (0, 3))[..., :64],
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients_give_the_bits_of_copies(
    layout: str, machine: Machine
) -> None:
    grid = vsa.Grid((5, 6, 7))
    *tensors, upstream = torch.randn(4, 2, grid.length, 4, 64).bfloat16()
    selection = vsa.select(*tensors[:2], 3, grid=grid)
    expected = _grads(machine, tensors, selection, upstream)
    make = LAYOUTS[layout]
    views = [make(x) for x in (*tensors, upstream)]
    assert not any(x.is_contiguous() for x in views)
    # `to` would keep the strides of leaves but not those of an upstream gradient in autograd.
    found = torch.ops.vsa.block_sparse_attention_backward(
        *_backward_arguments(machine, views, selection)
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def _backward_arguments(machine: Machine, tensors: list[Tensor], selection: vsa.Selection) -> list:
    backend, device = machine
    q, k, v, upstream = (x.to(device) for x in tensors)
    words, grid = selection.bitmap.to(device), selection.grid.as_ints()
    rest = words, None, grid, grid, 64**-0.5, backend, [], None, selection.num_key_tiles
    out, lse = torch.ops.vsa.block_sparse_attention(q, k, v, *rest)
    return [upstream, None, out, lse, q, k, v, *rest]


def test_an_expanded_upstream_gradient(machine: Machine) -> None:
    """What the backward of a sum hands over: one number with strides of 0."""
    backend, device = machine
    q = torch.randn(1, 5, 6, 7, 2, 64, device=device).bfloat16().requires_grad_()
    vsa.attention(q, q, q, 3, backend=backend).sum().backward()
    wide = q.detach().double().cpu().requires_grad_()
    vsa.attention(wide, wide, wide, 3, backend="torch").sum().backward()
    assert parity.error(q.grad.cpu(), wide.grad) < 0.01


@pytest.mark.usefixtures("same_bits")
def test_values_that_nobody_selected_never_reach_a_gradient(machine: Machine) -> None:
    grid = vsa.Grid((4, 8, 8))
    *tensors, upstream = torch.randn(4, 1, grid.length, 1, 64).bfloat16()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    selection = vsa.Selection.from_mask(mask, grid)
    clean = _grads(machine, tensors, selection, upstream)
    unselected = grid.tile_of_token() >= 2
    for x in tensors[1:]:
        x[:, unselected] = float("nan")
    found = _grads(machine, tensors, selection, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert all(x[:, unselected].abs().max() == 0 for x in found[1:])


def test_invalid_text_never_reaches_a_gradient(machine: Machine) -> None:
    grid = vsa.Grid((4, 8, 8), prefix=3, suffix=5)
    *tensors, upstream = torch.randn(4, 1, grid.length, 1, 64).bfloat16()
    selection = vsa.select(*tensors[:2], 2, grid=grid)
    valid = torch.tensor([[True, False, True, True, False, True, False, True]])
    invalid = torch.tensor([1, grid.length - 4, grid.length - 2])
    clean = _grads(machine, tensors, selection, upstream, text_valid=valid)
    for x in tensors:
        x[:, invalid] = float("nan")
    upstream[:, invalid] = float("inf")
    found = _grads(machine, tensors, selection, upstream, text_valid=valid)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert all(x[:, invalid].abs().max() == 0 for x in found)


def test_the_same_bits_whatever_the_schedule(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = vsa.Grid((9, 9, 9))
    *tensors, upstream = torch.randn(4, 2, grid.length, 2, 64).bfloat16()
    selection = vsa.select(*tensors[:2], 0.4, grid=grid)
    torch.use_deterministic_algorithms(True)
    runs = []
    try:
        for seed in range(6):
            monkeypatch.setattr(BACKENDS["emulated"].machine, "seed", seed)
            monkeypatch.setattr(BACKENDS["emulated"].machine, "blocks", 1 + seed % 3)
            runs.append(_grads(machine, tensors, selection, upstream))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 33), (64, 32), (100, 257)])
def test_bitmaps_are_transposed_and_counted(rows: int, columns: int, machine: Machine) -> None:
    mask = torch.rand(2, 3, rows, columns) < 0.4
    mask[0, 0, :, 0] = False
    selection = vsa.Selection.from_mask(mask).to(machine[1])
    words, counts = transpose(BACKENDS[machine[0]].machine, selection.bitmap, columns)
    assert torch.equal(words, selection.transpose().bitmap)
    assert torch.equal(counts.cpu(), mask.sum(2).int())


@pytest.mark.parametrize(
    ("columns", "layers", "text_tiles"),
    [(1, 1, 0), (7, 1, 0), (7, 7, 1), (96, 6, 3), (1200, 5, 2), (1201, 1, 2)],
)
def test_groups_of_key_tiles_are_ordered_by_their_longest_column(
    columns: int, layers: int, text_tiles: int, machine: Machine
) -> None:
    batch, kv_heads, sharing = 2, 3, 2
    counts = torch.randint(9, (batch, kv_heads * sharing, columns), dtype=torch.int32)
    axes = torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.int32)
    cleared = torch.zeros(1, dtype=torch.int32, device=machine[1])
    found = longest_first(
        BACKENDS[machine[0]].machine,
        counts.to(machine[1]),
        axes.to(machine[1]),
        text_tiles,
        layers,
        cleared,
    )
    order = found.groups
    to_and_fro = torch.arange(columns).view(layers, -1).clone()
    to_and_fro[:, 1::2] = to_and_fro[:, 1::2].flip(0)
    turns = (range(columns), to_and_fro.T.flatten().tolist())
    lengths = [[[0] * order.shape[-1] for _ in range(kv_heads)] for _ in range(batch)]
    for b, head, place in itertools.product(
        range(batch), range(kv_heads), range(text_tiles + columns)
    ):
        column = turns[axes[b, head]][place - text_tiles] if place >= text_tiles else -1
        heads = slice(head * sharing, (head + 1) * sharing)
        length = 10**6 if column < 0 else int(counts[b, heads, column].sum())
        row = lengths[b][head]
        row[place // 2] = max(row[place // 2], length)
    expected = [
        [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in of_batch]
        for of_batch in lengths
    ]
    assert order.tolist() == expected
    most = max(-(-len(lengths[0][0]) // 16), -(-text_tiles // 2))
    assert cleared.item() == max(
        min(long_ones(row), most) for of_batch in lengths for row in of_batch
    )


def long_ones(row: list[int]) -> int:
    """Of groups of these lengths those that take more than twice the mean, and text."""
    others = [length for length in row if length < 10**6]
    return sum(length * len(others) > 2 * sum(others) for length in others) + row.count(10**6)


def test_some_groups_are_long_ones(machine: Machine) -> None:
    """A few columns that all rows keep come before all others of all heads."""
    counts = torch.full((1, 2, 200), 3, dtype=torch.int32)
    counts[:, 1, [50, 51, 90]] = 200
    axes, cleared = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    given = (x.to(machine[1]) for x in (counts, axes))
    cleared = cleared.to(machine[1])
    found = longest_first(BACKENDS[machine[0]].machine, *given, 0, 1, cleared)
    assert cleared.item() == 2
    assert found.groups.tolist()[0][1][:3] == [25, 45, 0]


@pytest.mark.parametrize("gates", [None, "both"])
def test_a_training_step_under_compile_checkpointing_and_autocast(
    gates: str | None, machine: Machine
) -> None:
    """The layer's gradients are those that the torch backend gives."""
    backend, device = machine
    grads = {}
    for name in (backend, "torch"):
        torch.manual_seed(0)
        layer = vsa.nn.VideoSparseAttention(128, 2, topk=3, gates=gates, backend=name).to(device)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
        x = torch.randn(2, 5, 6, 7, 128, device=device, requires_grad=True)
        step = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast(device, torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
        y.float().square().sum().backward()
        grads[name] = [x.grad, *(p.grad for p in layer.parameters())]
    for found, expected in zip(grads[backend], grads["torch"], strict=True):
        assert parity.error(found, expected.double()) < 0.02


def test_a_step_is_captured_in_a_cuda_graph_without_waiting(machine: Machine) -> None:
    if machine[1] == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    problem = replace(by_name("text"), head_dim=64, dtype=torch.bfloat16)
    tensors = {name: x.cuda() for name, x in problem.inputs().items()}
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    valid = problem.valid().cuda()

    def step() -> tuple[Tensor, ...]:
        out = vsa.attention(*leaves, 2, grid=problem.query_grid, text_valid=valid, backend="hopper")
        return torch.autograd.grad(out, leaves, tensors["upstream"])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [x.clone() for x in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for x in found:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
