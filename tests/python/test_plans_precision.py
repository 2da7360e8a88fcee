# SPDX-License-Identifier: Apache-2.0
"""Prepared calls in low precision: the bits of calls without a plan, in their own precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from python.planned_calls import strided
from torch import Tensor

import vsa
from vsa.stages import eager
from vsa.values.remembered import Remembered

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

GRID = vsa.Grid((4, 5, 12))
TEXT = vsa.Grid((4, 5, 12), prefix=5, suffix=70)
precisions = pytest.mark.parametrize("precision", ["int8", "fp8"])


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_plans", Remembered(256))


def prepared() -> int:
    """Plans that run prepared calls."""
    return sum(plan.prepared is not None for plan in eager._plans.values.values())


def draw(
    grid: vsa.Grid = GRID, batch: int = 1, kv_heads: int = 2, head_dim: int = 64, heads: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, grid.length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def kinds() -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    q, k, v = draw()
    coarse, fine = torch.randn(1, GRID.length, 4, 64), torch.randn(1, 1, 4, 1)
    of_text = draw(TEXT, batch=2, kv_heads=1, heads=2)
    valid = torch.arange(150).view(2, 75) % 3 > 0
    fused = torch.stack([q] * 3, dim=3)
    return {
        "plain": ([q, k, v], {}),
        "dense": ([q, k, v], {"topk": 1.0}),
        "per head": ([q, k, v], {"topk": (1, 2, 3, 0.5)}),
        "mass": ([q, k, v], {"topk": vsa.TopP(0.6)}),
        "sub-blocks": ([q, k, v], {"score": vsa.SubBlocks(4)}),
        "gates": ([q, k, v], {"gate_coarse": coarse, "gate_fine": fine}),
        "fine gate": ([q, k, v], {"gate_fine": fine}),
        "text": (of_text, {"grid": TEXT, "text_valid": valid}),
        "all text": (of_text, {"grid": TEXT}),
        "wide": (draw(head_dim=128, batch=2), {"gate_coarse": torch.ones(1)}),
        "fp16": ([x.half() for x in (q, k, v)], {}),
        "strides": (list(fused.unbind(3)), {}),
        "odd addresses": ([strided(x, "odd address") for x in (q, k, v)], {}),
        "given": ([q, k, v], {"selection": vsa.select(q, k, 2, grid=GRID)}),
        "given, gates": (
            [q, k, v], {"selection": vsa.select(q, k, 2, grid=GRID), "gate_coarse": coarse}
        ),
    }  # fmt: skip


def run(tensors: list[Tensor], precision: str, **options: Any) -> list[Tensor]:
    """Out, log-sum-exp and choice, by the emulated kernels."""
    topk = None if "selection" in options else options.pop("topk", 2)
    options = {"grid": GRID} | options
    out, selection, lse = vsa.attention(
        *tensors, topk, precision=precision, backend="emulated", return_selection=True,
        return_lse=True, **options,
    )  # fmt: skip
    return [out, lse, selection.bitmap]


@precisions
@pytest.mark.parametrize("kind", kinds())
def test_a_plan_gives_the_bits_of_a_call_without_one(kind: str, precision: str) -> None:
    tensors, options = kinds()[kind]
    with eager.paused():
        expected = run(tensors, precision, **options)
    assert prepared() == 0
    for _ in range(3):
        for found, wanted in zip(run(tensors, precision, **options), expected, strict=True):
            assert torch.equal(found, wanted)
    assert prepared() == 1


@precisions
def test_block_sparse_attention_is_prepared_too(precision) -> None:
    q, k, v = draw()
    selection = vsa.select(q, k, 2, grid=GRID)

    def call() -> Tensor:
        return vsa.block_sparse_attention(
            q, k, v, selection, precision=precision, backend="emulated"
        )

    with eager.paused():
        expected = call()
    assert torch.equal(call(), expected) and prepared() == 1 and torch.equal(call(), expected)


def test_each_precision_has_plans_of_its_own() -> None:
    tensors = draw()
    with eager.paused():
        expected = {name: run(tensors, name) for name in ("native", "int8", "fp8")}
    assert not torch.equal(expected["int8"][0], expected["fp8"][0])
    for _ in range(3):
        for name, (out, lse, _) in expected.items():
            found = run(tensors, name)
            assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    assert prepared() == 3


def test_a_plan_does_not_let_through_what_is_refused() -> None:
    q, k, v = draw()
    run([q, k, v], "int8")
    expected = run([q, k, v], "int8")[0]
    assert prepared() == 1
    for at, name in enumerate("qkv"):
        leaves = [x.clone().requires_grad_(place == at) for place, x in enumerate((q, k, v))]
        with pytest.raises(ValueError, match=f"{name} wants a gradient, but precision='int8'"):
            run(leaves, "int8")
        with torch.no_grad():
            assert torch.equal(run(leaves, "int8")[0], expected)
    gate = torch.ones(1, GRID.length, 4, 64)
    run([q, k, v], "int8", gate_fine=gate)
    with pytest.raises(ValueError, match="gate_fine wants a gradient"):
        run([q, k, v], "int8", gate_fine=gate.requires_grad_())
    with pytest.raises(ValueError, match='precision must be "native", "int8" or "fp8"'):
        run([q, k, v], "int4")
    with pytest.raises(ValueError, match="tail must be False for precision='int8'"):
        run([q, k, v], "int8", tail=True)
    for precision in (["int8"], None, 8):
        with pytest.raises(ValueError, match="precision must be"):
            run([q, k, v], precision)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="q must be bf16 or fp16"):
        run([x.float() for x in (q, k, v)], "int8")


def test_heads_in_slices_are_prepared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from vsa.backends.kernels import head_slices

    tensors, options = kinds()["text"]
    expected = run(tensors, "int8", **options)
    eager._plans = Remembered(256)
    monkeypatch.setattr(head_slices, "MOST_HELD", 1.0)
    for _ in range(2):
        for found, wanted in zip(run(tensors, "int8", **options), expected, strict=True):
            assert torch.equal(found, wanted)


def test_what_is_held_is_one_slice_of_heads() -> None:
    from vsa import _C
    from vsa.backends.kernels.prepared import PreparedAttention

    q, k, v = draw(vsa.Grid((4, 8, 32)), kv_heads=4)
    selection = vsa.select(q, k, 2, grid=(4, 8, 32))
    for _ in range(2):
        vsa.block_sparse_attention(q, k, v, selection, precision="int8", backend="emulated")
    (plan,) = eager._plans.values.values()
    assert isinstance(plan.prepared, PreparedAttention)
    a_head = 16 * _C.quantised_tile_bytes(64)
    given = sum(x.numel() * x.element_size() for x in (q, k, v))
    assert a_head < plan.prepared.work_bytes <= 0.15 * given + 16_384  # means, records and so on


@precisions
def test_values_that_are_no_numbers_take_the_same_way(precision) -> None:
    q, k, v = draw()
    run([q, k, v], precision)
    spoiled = [x.clone() for x in (q, k, v)]
    spoiled[0][0, 3, 1, 7], spoiled[1][0, 100, 1, 5] = torch.nan, -torch.inf
    spoiled[2][0, 200, 0, 9] = torch.inf
    found = run(spoiled, precision)  # by the plan
    with eager.paused():
        expected = run(spoiled, precision)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert found[0].isnan().any() and not found[0].isinf().any()


@precisions
def test_fused_gates_are_those_of_the_operator_under_compile(precision) -> None:
    tensors, options = kinds()["gates"]
    expected = run(tensors, precision, **options)

    def call(q: Tensor, k: Tensor, v: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
        gates = {"gate_coarse": coarse, "gate_fine": fine}
        return vsa.attention(
            q, k, v, 2, grid=GRID, precision=precision, backend="emulated", **gates
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    gates = options["gate_coarse"], options["gate_fine"]
    assert torch.equal(compiled(*tensors, *gates), expected[0])
