# SPDX-License-Identifier: Apache-2.0
"""The project's own kernels: one source, on the emulator and on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import vsa
from vsa.backends import BACKENDS
from vsa.backends.kernels.tensors import addressable
from vsa.verify import parity
from vsa.verify.parity import PROBLEMS, Problem

ELEMENTS = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
Machine = tuple[str, str]


def _call(machine: Machine, q, k, v, selection: vsa.Selection, **options):
    backend, device = machine
    valid = options.pop("text_valid", None)
    out, lse = vsa.block_sparse_attention(
        *(x.to(device) for x in (q, k, v)),
        selection.to(device),
        text_valid=None if valid is None else valid.to(device),
        return_lse=True,
        backend=backend,
        **options,
    )
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_error_is_at_most_twice_that_of_sdpa(
    problem: Problem, head_dim: int, element: torch.dtype, machine: Machine
) -> None:
    problem = replace(problem, head_dim=head_dim, dtype=element)
    ratios = parity.relative_to_sdpa(problem, machine[1], backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("volume", [1, 2, 3, 7, 12, 31, 47, 63, 64])
def test_every_tile_volume(volume: int, machine: Machine) -> None:
    problem = Problem(
        "volume", grid=(1, 1, 3 * volume + 1), tile=(1, 1, volume), topk=3, head_dim=64,
        heads=1, kv_heads=1, dtype=torch.bfloat16,
    )  # fmt: skip
    ratios = parity.relative_to_sdpa(problem, machine[1], backend=machine[0])
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


def test_lse_is_exact_and_minus_infinity_where_nothing_is_attended(machine: Machine) -> None:
    grid = vsa.Grid((4, 8, 8), prefix=3)
    q, k, v = torch.randn(3, 1, grid.length, 2, 64, dtype=torch.bfloat16)
    mask = torch.rand(1, 2, 4, 4) < 0.5
    mask[:, :, 1] = False
    valid = torch.zeros(1, 3, dtype=torch.bool)
    selection = vsa.Selection.from_mask(mask, grid)
    out, lse = _call(machine, q, k, v, selection, text_valid=valid)
    expected, expected_lse = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, text_valid=valid, return_lse=True
    )
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    idle = expected_lse.isinf().transpose(1, 2)
    assert out[idle].abs().max() == 0 and idle.sum() > 64
    assert (out.double() - expected).abs().max() < 0.02


def test_large_logits_and_growing_maxima(machine: Machine) -> None:
    """Later tiles exceed earlier ones by far, so outputs have to be rescaled again and again."""
    grid = vsa.Grid((4, 4, 64))
    q, k, v = torch.randn(3, 1, grid.tokens, 1, 128, dtype=torch.float16)
    k = k * torch.linspace(0.1, 12, grid.tokens)[None, :, None, None].half()
    everything = vsa.Selection.from_mask(torch.ones(1, 1, 16, 16, dtype=torch.bool), grid)
    out, lse = _call(machine, q, k, v, everything)
    expected, expected_lse = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), everything, return_lse=True
    )
    assert parity.error(out, expected) < 2e-3
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale: float, machine: Machine) -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 7, 2, 64, dtype=torch.bfloat16)
    selection = vsa.select(q, k, 3)
    out, _ = _call(machine, q, k, v, selection, scale=scale)
    expected = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, scale=scale
    )
    assert parity.error(out, expected) < 0.01


@pytest.mark.parametrize(
    "layout", ["fused-qkv", "heads-first", "sliced-heads", "odd-strides", "one"]
)
def test_strided_views_give_the_bits_of_copies(layout: str, machine: Machine) -> None:
    length, heads = 5 * 6 * 7, 4
    make = {
        "fused-qkv": lambda: torch.randn(2, length, 3, heads, 64).bfloat16().unbind(2),
        "heads-first": lambda: [
            x.transpose(1, 2) for x in torch.randn(3, 2, heads, length, 64).bfloat16()
        ],
        "sliced-heads": lambda: torch.randn(3, 2, length + 3, 2 * heads, 64).bfloat16()[
            :, :, 3:, ::2
        ],
        "odd-strides": lambda: torch.randn(3, 2, length, heads, 67).bfloat16()[..., :64],
        "one": lambda: torch.randn(3, 1, 1, length, 1, 64).bfloat16()[:, :, 0],
    }
    q, k, v = make[layout]()
    selection = vsa.select(q, k, 3, grid=(5, 6, 7))
    views = _call(machine, q, k, v, selection)
    copies = _call(
        machine, *(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), selection
    )
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


def _rows(channels: int = 64) -> torch.Tensor:
    return torch.randn(2, 4, 6, channels).bfloat16()


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        pytest.param(_rows(), False, id="contiguous"),
        pytest.param(_rows().transpose(1, 2), False, id="heads-first"),
        pytest.param(_rows()[:, :, ::2], False, id="every-other-head"),
        pytest.param(_rows(72)[..., :64], False, id="multiples-of-16-bytes"),
        pytest.param(_rows(68)[..., :64], True, id="odd-strides"),
        pytest.param(_rows().flatten()[1:129].view(1, 1, 1, 128), True, id="misaligned"),
        pytest.param(_rows()[:1].expand(2, -1, -1, -1), True, id="expanded"),
        pytest.param(_rows().transpose(1, 2)[:, :, :3], True, id="some-heads"),
        pytest.param(torch.randn(2, 4, 64, 6).bfloat16().mT, True, id="channels-outside"),
    ],
)
def test_only_what_tma_cannot_address_is_copied(x: torch.Tensor, copied: bool) -> None:
    found = addressable(x)
    assert (found is not x) == copied and torch.equal(found, x)
    assert found.is_contiguous() or not copied


def test_strides_that_no_tensor_map_holds_are_copied() -> None:
    for stride, copied in ((2**30, False), (2**39, True), (2**40 + 8, True)):
        x = torch.empty_strided(
            (2, 4, 1, 64), (stride, 64, 64, 1), dtype=torch.bfloat16, device="meta"
        )
        assert (addressable(x) is not x) == copied


def test_unselected_and_invalid_values_never_reach_the_output(machine: Machine) -> None:
    grid = vsa.Grid((4, 8, 8), suffix=5)
    q, k, v = torch.randn(3, 1, grid.length, 1, 64).bfloat16()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    valid = torch.tensor([[True, False, True, False, True]])
    poison = functional.pad(grid.tile_of_token() >= 2, (0, 5))
    poison[[-4, -2]] = True
    selection = vsa.Selection.from_mask(mask, grid)
    clean, _ = _call(machine, q, k, v, selection, text_valid=valid)
    bad = [x.masked_fill(poison[:, None, None], float("nan")) for x in (k, v)]
    dirty, _ = _call(machine, q, *bad, selection, text_valid=valid)
    assert torch.equal(clean[:, : grid.tokens], dirty[:, : grid.tokens])
    assert clean[:, [-4, -2]].abs().max() == 0


def test_results_are_the_same_bits_whatever_the_schedule(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(3, 2, 9, 9, 9, 2, 128).bfloat16()
    selection = vsa.select(q, k, 0.4)
    runs = []
    for seed in range(6):
        monkeypatch.setattr(BACKENDS["emulated"].machine, "seed", seed)
        monkeypatch.setattr(BACKENDS["emulated"].machine, "blocks", 1 + seed % 3)
        runs.append(_call(machine, q, k, v, selection))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_whole_operation_with_gates_under_compile(machine: Machine) -> None:
    backend, device = machine
    q, k, v, gate = torch.randn(4, 1, 5, 6, 7, 2, 64, device=device).bfloat16()
    options = {"gate_coarse": gate, "backend": backend}
    with torch.no_grad():
        eager = vsa.attention(q, k, v, 3, **options)
        compiled = torch.compile(vsa.attention, fullgraph=True, backend="aot_eager")(
            q, k, v, 3, **options
        )
        expected = vsa.attention(
            q.float(), k.float(), v.float(), 3, gate_coarse=gate.float(), backend="torch"
        )
    torch.testing.assert_close(compiled, eager)
    assert parity.error(eager.cpu(), expected.cpu().double()) < 0.01


def test_what_the_kernels_cannot_do_is_said(machine: Machine) -> None:
    backend, device = machine
    for q, reason in (
        (torch.randn(1, 4, 4, 4, 1, 64, device=device), "not float32"),
        (torch.randn(1, 4, 4, 4, 1, 96, device=device).bfloat16(), "64 or 128, not 96"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            vsa.attention(q, q, q, 1, backend=backend)
    q = torch.randn(1, 1, 1, 64, device=device).bfloat16()
    k = torch.randn(1, 65537, 1, 64, device=device).bfloat16()
    one, many = vsa.Grid((1, 1, 1), (1, 1, 1)), vsa.Grid((1, 1, 65537), (1, 1, 1))
    with pytest.raises(RuntimeError, match="k has more than 65536 tiles along an axis"):
        vsa.attention(q, k, k, 1, grid=one, kv_grid=many, backend=backend)


def test_captured_in_a_cuda_graph_without_waiting_for_the_device(machine: Machine) -> None:
    if machine[1] == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    q, k, v, gate = torch.randn(4, 1, 9, 10, 11, 3, 64, device="cuda").bfloat16()
    valid = torch.tensor([[True, False, True]], device="cuda")
    text = torch.randn(3, 1, 3 + 990, 3, 64, device="cuda").bfloat16()
    grid = vsa.Grid((9, 10, 11), prefix=3)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        plain = vsa.attention(q, k, v, 0.2, gate_coarse=gate, backend="hopper")
        return plain, vsa.attention(*text, 4, grid=grid, text_valid=valid, backend="hopper")

    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [x.clone() for x in run()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
