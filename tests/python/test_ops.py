# SPDX-License-Identifier: Apache-2.0
"""Operators: opcheck, torch.compile, checkpointing, autocast, bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import vsa
from vsa.measure.timing import peak_memory
from vsa.verify.parity import Problem, by_name, ours, worst

NO_MASK = [], None


def _fine_arguments(dtype: torch.dtype = torch.float32) -> tuple:
    problem = by_name("text", dtype=dtype, head_dim=8)
    tensors = problem.inputs()
    call = problem.query_grid.as_ints()
    words = vsa.select(tensors["q"], tensors["k"], 2, grid=problem.query_grid).bitmap
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")
    return q, k, v, words, problem.valid(), call, call, 0.3, "torch", *NO_MASK, 2


@pytest.mark.older_pytorch
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.vsa.block_sparse_attention, _fine_arguments())
    means = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    rest = 0.0, None, 0.3, "torch", *NO_MASK, []
    torch.library.opcheck(torch.ops.vsa.select_tiles, (*means, None, [3], *rest))
    torch.library.opcheck(torch.ops.vsa.select_tiles, (*means, torch.eye(9).bool(), [3], *rest))
    three = (*means, torch.randn(2, 2, 9, 8))
    torch.library.opcheck(torch.ops.vsa.select_and_attend, (*means, None, [3], *rest, three[2]))
    torch.library.opcheck(torch.ops.vsa.coarse_attention, (*three, 0.3, "torch"))
    q, k, v, *plan = _fine_arguments()
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.vsa.block_sparse_attention(q, k, v, *plan)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, q, k, v, *plan)
    torch.library.opcheck(torch.ops.vsa.block_sparse_attention_backward, backward)


GATED = Problem(
    "gated", grid=(4, 4, 5), prefix=3, suffix=2, text_valid=True, batch=2, heads=4, kv_heads=2,
    topk=1, head_dim=64, dtype=torch.bfloat16, gate_coarse=True, gate_fine=True,
)  # fmt: skip
GATES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor] | None, ...]] = {
    "none": (None, None),
    "fine": (lambda gate: gate, None),
    "coarse": (None, lambda gate: gate),
    "both": (lambda gate: gate, lambda gate: gate),
    "per-head-fp32": (
        lambda gate: gate[:1, :1, :, :1].float().expand_as(gate),
        lambda gate: gate[..., :1].float().expand_as(gate),
    ),
}


@pytest.mark.parametrize("kind", GATES)
def test_opcheck_of_gated_operators(kind: str) -> None:
    tensors, grid = GATED.inputs(), GATED.query_grid
    words = vsa.select(tensors["q"], tensors["k"], 1, grid=grid).bitmap
    fine, coarse = (
        None if make is None else make(tensors[name]).detach().requires_grad_()
        for make, name in zip(GATES[kind], ("gate_fine", "gate_coarse"), strict=True)
    )
    means: list[torch.Tensor | None] = [None] * 3
    rows = None
    if coarse is not None:
        three = [tensors[name] for name in "qkv"]
        means = torch.ops.vsa.tile_means(three, 3 * grid.as_ints(), "emulated")
        rows = torch.ops.vsa.coarse_attention(*means, 0.3, "emulated")
    plan = (grid.as_ints(), grid.as_ints(), 0.3, "emulated", *NO_MASK)
    valid = GATED.valid()
    q, k, v = (tensors[name].requires_grad_() for name in "qkv")
    arguments = (q, k, v, words, valid, *plan, *means, fine, coarse, rows)
    torch.library.opcheck(torch.ops.vsa.gated_attention, arguments)
    with torch.no_grad():
        inference = (*arguments[:11], *arguments[14:])
        torch.library.opcheck(
            torch.ops.vsa.gated_attention_inference, [_detached(x) for x in inference]
        )
        out, lse, part = torch.ops.vsa.gated_attention(*arguments)
    for grad_lse in (None, torch.randn_like(lse)):
        backward = [torch.randn_like(out), grad_lse, part, lse, *map(_detached, arguments)]
        torch.library.opcheck(torch.ops.vsa.gated_attention_backward, backward)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


@pytest.mark.older_pytorch
@pytest.mark.parametrize("name", ["gates", "text", "other-keys", "dense"])
def test_compile_is_one_graph_with_the_same_result(name: str) -> None:
    problem = by_name(name, dtype=torch.float32)
    tensors = problem.inputs()
    options = {
        "grid": problem.query_grid,
        "kv_grid": None if problem.kv_grid is None else problem.key_grid,
        "text_valid": problem.valid(),
    }
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if not n.startswith("upstream")}
    runs = []
    for function in (
        vsa.attention,
        torch.compile(vsa.attention, fullgraph=True, backend="aot_eager"),
    ):
        out, lse = function(**leaves, topk=problem.topk, return_lse=True, **options)
        loss = (out * tensors["upstream"]).sum() + lse.masked_fill(lse.isinf(), 0).sum()
        runs.append([out, lse, *torch.autograd.grad(loss, list(leaves.values()))])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_one_compiled_function_takes_changing_shapes() -> None:
    """Sizes that change between calls become symbols; what depends on them must not break."""
    compiled = torch.compile(vsa.attention, fullgraph=True, backend="aot_eager")
    for batch, shape, heads, head_dim in (
        (1, (5, 6, 7), 2, 16),
        (2, (4, 9, 8), 2, 32),
        (3, (6, 5, 9), 3, 8),
    ):
        q, k, v, gate = torch.randn(4, batch, *shape, heads, head_dim)
        found = compiled(q, k, v, 3, gate_coarse=gate)
        torch.testing.assert_close(found, vsa.attention(q, k, v, 3, gate_coarse=gate))


def test_inductor_compiles_the_layer_with_autocast_and_checkpointing() -> None:
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=3, gates="both")
    torch.nn.init.normal_(layer.to_gate_compress.weight, std=0.2)
    x = torch.randn(2, 5, 6, 7, 32, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(layer, x, use_reentrant=False).float().square().mean()

    expected = torch.autograd.grad(step(x), [x, *layer.parameters()])
    # Its own choices take longer: what vectors this CPU has, and processes that compile for it.
    options = {"cpp.simdlen": 1, "compile_threads": 1}
    compiled = torch.compile(step, fullgraph=True, options=options)
    found = torch.autograd.grad(compiled(x), [x, *layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert worst(a, b.double()) < 0.05


def test_selections_pass_through_compiled_regions() -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 7, 2, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_steps(q: torch.Tensor) -> tuple[torch.Tensor, vsa.Selection]:
        out, selection = vsa.attention(q, k, v, 3, return_selection=True)
        return out + vsa.attention(q * 2, k, v, None, selection=selection), selection

    out, selection = two_steps(q)
    eager = vsa.attention(q, k, v, 3) + vsa.attention(q * 2, k, v, None, selection=selection)
    torch.testing.assert_close(out, eager)
    assert selection.density == pytest.approx(3 / 8)


def test_selective_checkpointing_finds_the_operator_by_name() -> None:
    saved = []

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op is torch.ops.vsa.block_sparse_attention.default:
            saved.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 5, 6, 7, 2, 16).unbind())
    plain = torch.autograd.grad(vsa.attention(q, k, v, 3).square().sum(), (q, k, v))
    out = checkpoint(
        lambda *x: vsa.attention(*x, 3),
        q,
        k,
        v,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    again = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert saved and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_operators_say_what_a_backend_does_not_have(backend: str) -> None:
    q, k, v, words, valid, grid, kv_grid, scale, *_ = (_detached(x) for x in _fine_arguments())
    problem = q, k, v, words, valid, grid, kv_grid, scale, backend, *NO_MASK
    with pytest.raises(NotImplementedError, match=f"^backend '{backend}' has no fused gates"):
        torch.ops.vsa.gated_attention_inference(*problem, q, None, None)


def test_kernels_refuse_tensors_of_another_device() -> None:
    """Only an operator can bring them here; their addresses are no memory of the machine."""
    x = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^backend 'hopper' takes tensors on cuda devices"):
        torch.ops.vsa.tile_means([x], vsa.Grid((4, 4, 4)).as_ints(), "hopper")


def test_operators_refuse_a_grid_of_other_tokens() -> None:
    """The kernels go by the grid: they would read past the end of a shorter tensor."""
    q, k, v = torch.randn(3, 1, 128, 2, 64).bfloat16().unbind()
    right, longer = vsa.Grid((4, 4, 8)).as_ints(), vsa.Grid((4, 8, 8)).as_ints()
    rest = 0.125, "emulated", *NO_MASK
    words = torch.full((1, 2, 4, 1), 3, dtype=torch.int32)
    for grid, kv_grid, name in ((longer, right, "q"), (right, longer, "k")):
        sentence = rf"^({name}|a tensor of tile means) must have the 256 tokens of its grid"
        whole = q, k, v, None, None, None, [1], 0.0, None, grid, kv_grid, 1, *rest, []
        for run in (torch.ops.vsa.attention, torch.ops.vsa.attention_inference):
            with pytest.raises(ValueError, match=sentence):
                run(*whole)
        with pytest.raises(
            ValueError, match=rf"^{name} has 128 tokens in its sequence, but its grid has 256"
        ):
            torch.ops.vsa.select_by_sub_blocks(
                q, k, None, [1], 0.0, None, grid, kv_grid, 4, *rest, []
            )
        with pytest.raises(ValueError, match=sentence):
            torch.ops.vsa.block_sparse_attention(q, k, v, words, None, grid, kv_grid, *rest, 2)
    with pytest.raises(ValueError, match=r"^a tensor of tile means must have the 256 tokens"):
        torch.ops.vsa.tile_means([q], longer, "emulated")


def test_the_operator_itself_follows_autocast() -> None:
    arguments = _fine_arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = torch.ops.vsa.block_sparse_attention(*arguments)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (dq,) = torch.autograd.grad(out.float().sum(), arguments[:1])
    assert dq.dtype == torch.float32


def test_no_matrix_of_tokens_is_ever_made() -> None:
    """Peak memory stays a small multiple of the inputs, far under a token-by-token matrix."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 16, 32, 16, 4, 64).unbind())
    inputs = 3 * q.nbytes
    _, forward = peak_memory(lambda: vsa.attention(q, k, v, 0.125), q.device)
    _, both = peak_memory(lambda: vsa.attention(q, k, v, 0.125).sum().backward(), q.device)
    assert forward < 4 * inputs and both < 4 * inputs
    assert both < 4 * 8192**2


def test_large_selections_fit_in_slices() -> None:
    """Choosing among many tiles never holds the whole matrix of tile scores."""
    means = torch.randn(1, 1, 9000, 2)
    words, peak = peak_memory(
        lambda: torch.ops.vsa.select_tiles(
            means, means, None, [10], 0.0, None, 1.0, "torch", *NO_MASK, []
        ),
        means.device,
    )
    assert words.shape == (1, 1, 9000, 282)
    assert peak < 4 * 9000 * 9000 * 4


def test_grouped_heads_share_one_gradient() -> None:
    problem = by_name("multi-query", dtype=torch.float32)
    result, _ = ours(problem, problem.inputs())
    assert result.grads["k"].shape == (1, 210, 1, 16)
