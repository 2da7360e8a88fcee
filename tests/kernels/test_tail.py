# SPDX-License-Identifier: Apache-2.0
"""The kernels of the tail: one source, on the emulator and on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends.kernels import tail_calls
from vsa.backends.kernels.machine import Emulator
from vsa.backends.kernels.tail_forward import rounded
from vsa.values.problem import TailMeans
from vsa.verify import parity
from vsa.verify.parity import Problem

Machine = tuple[str, str]
ELEMENTS = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
# Three chunks of means, the last of 22, and work tiles of which some consumers have none.
MANY = Problem(
    "many", grid=(2, 5, 6), kv_grid=(5, 9, 11), tile=(1, 2, 2), topk=5, kv_heads=1, tail=True,
    gate_coarse=True, gate_fine=True,
)  # fmt: skip
PROBLEMS = [
    MANY,
    replace(MANY, name="no gates", gate_coarse=False, gate_fine=False, batch=2),
    replace(MANY, name="coarse gate", gate_fine=False),
    replace(MANY, name="fine gate", gate_coarse=False, kv_grid=(3, 9, 8)),
    replace(MANY, name="text", prefix=3, suffix=70, text_valid=True, batch=2, kv_grid=(3, 9, 9)),
    Problem("one chunk", grid=(1, 1, 9), kv_grid=(1, 1, 64 * 9), tile=(1, 1, 9), topk=1, tail=True),
    Problem("sub-blocks", grid=(3, 9, 10), topk=4, runs=4, gate_coarse=True, tail=True),
    Problem("clipped", grid=(5, 5, 9), tile=(2, 3, 2), topk=2, tail=True, magnitude=30.0),
]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_error_is_at_most_twice_that_of_sdpa(
    problem: Problem, head_dim: int, element: torch.dtype, machine: Machine
) -> None:
    problem = replace(problem, head_dim=head_dim, dtype=element)
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def grads_of(
    machine: Machine, tensors: list[Tensor], mask: Tensor, grid: vsa.Grid, **options
) -> list[Tensor]:
    """Out, lse, dq, dk and dv."""
    backend, device = machine
    leaves = [x.to(device).detach().requires_grad_() for x in tensors[:3]]
    selection = vsa.Selection.from_mask(mask).to(device)
    out, lse = vsa.block_sparse_attention(
        *leaves, selection, grid=grid, tail=True, return_lse=True, backend=backend, **options
    )
    loss = (out.float() * tensors[3].to(device).float()).sum() + lse.sum()
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_from_nothing_to_everything(head_dim: int, machine: Machine) -> None:
    """Rows that choose no tile, all tiles, or all of a chunk; columns that nobody chooses."""
    grid = vsa.Grid((3, 10, 10), tile=(1, 2, 2))
    n = grid.num_tiles
    tensors = [*torch.randn(4, 1, grid.length, 2, head_dim).bfloat16()]
    mask = torch.rand(1, 2, n, n) < 0.05
    mask[:, 0, :, 7], mask[:, 1, :, 8] = False, True
    mask[:, :, 3], mask[:, :, 4] = False, True
    mask[:, :, 5, :64], mask[:, :, 6, 64:] = True, True
    found = grads_of(machine, tensors, mask, grid)
    wide = [x.double() for x in tensors]
    true = grads_of(("torch", "cpu"), wide, mask, grid)
    for name, x, truth in zip(("out", "lse", "dq", "dk", "dv"), found, true, strict=True):
        assert parity.error(x, truth) < 0.005, name
    # Where all is chosen there is no tail: the fine stage's numbers, to the bit.
    backend, device = machine
    chosen = vsa.Selection.from_mask(mask).to(device)
    q, k, v = (x.to(device) for x in tensors[:3])
    out, lse = vsa.block_sparse_attention(
        q, k, v, chosen, grid=grid, return_lse=True, backend=backend
    )
    whole = grid.tile_of_token() == 4
    assert torch.equal(out.cpu()[:, whole], found[0][:, whole])
    assert torch.equal(lse.cpu()[..., whole], found[1][..., whole])


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale: float, machine: Machine) -> None:
    grid = vsa.Grid((2, 6, 7), tile=(1, 2, 3))
    tensors = [*torch.randn(4, 1, grid.length, 2, 64).bfloat16()]
    mask = torch.rand(1, 2, grid.num_tiles, grid.num_tiles) < 0.2
    found = grads_of(machine, tensors, mask, grid, scale=scale)
    true = grads_of(("torch", "cpu"), [x.double() for x in tensors], mask, grid, scale=scale)
    for x, truth in zip(found, true, strict=True):
        assert parity.error(x, truth) < 0.01 or truth.abs().max() == x.abs().max() == 0


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("magnitude", [10.0, 30.0, 100.0])
def test_scores_of_means_are_as_exact_as_those_of_keys(
    magnitude: float, element: torch.dtype, machine: Machine
) -> None:
    """With means of keys in 16 bits alone, out is up to 2.7 times as wrong as PyTorch's at 30."""
    problem = Problem(
        "large", grid=(2, 6, 7), tile=(1, 2, 3), topk=2, tail=True, head_dim=64, dtype=element,
        magnitude=magnitude,
    )  # fmt: skip
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 1.5 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("volume", [1, 3, 7, 31, 63, 64])
def test_every_tile_volume(volume: int, machine: Machine) -> None:
    problem = Problem(
        "volume", grid=(1, 1, 3 * volume + 1), tile=(1, 1, volume), topk=2, head_dim=64,
        heads=1, kv_heads=1, tail=True, dtype=torch.bfloat16,
    )  # fmt: skip
    ratios = parity.relative_to_sdpa(problem, machine[1], gradients=True, backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.usefixtures("same_bits")
def test_training_and_inference_give_the_same_bits_every_time(machine: Machine) -> None:
    problem = replace(MANY, head_dim=64, dtype=torch.bfloat16)
    tensors = problem.inputs()
    runs = [parity.ours(problem, tensors, machine[1], backend=machine[0])[0] for _ in range(2)]
    idle, _ = parity.ours(problem, tensors, machine[1], gradients=False, backend=machine[0])
    assert torch.equal(runs[0].out, idle.out) and torch.equal(runs[0].lse, idle.lse)
    assert torch.equal(runs[0].out, runs[1].out)
    assert all(torch.equal(runs[0].grads[x], runs[1].grads[x]) for x in runs[0].grads)


@pytest.mark.usefixtures("same_bits")
def test_gates_are_applied_to_the_whole_softmax_before_it_is_rounded(machine: Machine) -> None:
    problem = replace(MANY, head_dim=64, dtype=torch.bfloat16, gate_coarse=False)
    tensors = problem.inputs()
    one = tensors | {"gate_fine": torch.ones_like(tensors["gate_fine"])}
    gated, _ = parity.ours(problem, one, machine[1], backend=machine[0])
    plain = {name: x for name, x in tensors.items() if name != "gate_fine"}
    alone, _ = parity.ours(replace(problem, gate_fine=False), plain, machine[1], backend=machine[0])
    assert torch.equal(gated.out, alone.out) and torch.equal(gated.lse, alone.lse)
    for name in "qkv":
        assert torch.equal(gated.grads[name], alone.grads[name])


def test_means_are_rounded_and_sizes_are_their_logarithms() -> None:
    grid = vsa.Grid((3, 9, 10), tile=(2, 2, 2))
    k, v = torch.randn(2, 1, 2, grid.num_tiles, 64)
    kept = rounded(Emulator(), TailMeans(k, v), grid, torch.float16)
    assert torch.equal(kept.k, k.half()) and torch.equal(kept.v, v.half())
    assert torch.equal(kept.k_low, (k - k.half()).half())
    torch.testing.assert_close(kept.bias[: grid.num_tiles], grid.sizes.float().log2())
    assert len(kept.bias) == 64 and (kept.bias[grid.num_tiles :] == float("-inf")).all()


def test_query_tiles_are_split_where_there_are_few_means() -> None:
    def splits(batch: int, heads: int, kv_heads: int, shape: tuple[int, int, int]) -> int:
        grid = vsa.Grid(shape)
        return tail_calls.splits_of(batch, heads, kv_heads, (grid, grid))

    assert splits(1, 1, 1, (4, 4, 4)) == 1  # a single query tile
    assert splits(1, 1, 1, (8, 16, 16)) == 16
    assert splits(1, 12, 12, (21, 30, 52)) == 9
    assert splits(8, 40, 40, (21, 60, 104)) == 1
