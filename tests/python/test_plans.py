# SPDX-License-Identifier: Apache-2.0
"""A remembered call gives the bits, errors and gradients of the same call without a plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.machines import machine_of
from python.planned_calls import (
    ALL,
    BASE,
    FLAT,
    GATED,
    OF_A_FRESH_PROCESS,
    TRAINED,
    VIDEO,
    Call,
    digest,
    outcome,
    same_by_a_plan,
    strided,
    unplanned,
    without_plans,
)
from torch import Tensor

import vsa
from vsa import TopP
from vsa.backends.kernels import coarse_backward, coarse_select, prepared_coarse
from vsa.stages import eager


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return without_plans(monkeypatch)


TEXT = Call(text=(5, 2))
MASKED = Call(text=(5, 2), valid="some")
MASKS = ["some", "expanded", "expanded in inference", "a column of more"]
BITMAPS = ["contiguous", "heads outside", "odd address", "expanded", "expanded in inference"]
GATES = [None, "contiguous"] * 3
GATES += ["fp32", "broadcast", "expanded", "channels outside", "odd address"]
STRIDES = ["part", "heads outside", "odd address", "axes exchanged", "tokens of 136 bytes"]
CALLS = st.builds(
    Call,
    shape=st.sampled_from([VIDEO, FLAT, (2, 4, 5, 1, 2, 64), (1, 3, 4, 5, 2, 128)]),
    kv_heads=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    strides=st.sampled_from(["contiguous"] * 6 + STRIDES),
    gates=st.tuples(st.sampled_from(GATES), st.sampled_from(GATES)),
    topk=st.sampled_from([1, 1.0, 0.5, 2, (1, 2), (1.0, 2), TopP(0.5), TopP(0.5, 1.0)]),
    scale=st.sampled_from([None] * 4 + [1, 1.0, 0.25, 0, -0.25]),
    tile=st.sampled_from([(4, 4, 4), (2, 4, 4), "auto"]),
    grid=st.none(),
    wants=st.sampled_from(["", "", "q", "v", "qkvfc", "f", "kc"]),
    upstream=st.sampled_from(["out", "lse", "both", "expanded", "transposed", "odd address"]),
    autocast=st.sampled_from([False, False, True, torch.float16, torch.bfloat16]),
    text=st.sampled_from([(0, 0)] * 3 + [(7, 0), (0, 70), (3, 66)]),
    valid=st.sampled_from([None, "none", "all", *MASKS]),
    score=st.sampled_from(["mean", "mean", vsa.SubBlocks(1), vsa.SubBlocks(4), vsa.SubBlocks(9)]),
    given=st.sampled_from([None] * 4 + BITMAPS),
    tail=st.sampled_from([False, False, True]),
)


def test_sequences_of_calls(ran: list[int]) -> None:
    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(CALLS, min_size=1, max_size=3), st.randoms(use_true_random=False))
    def compare(calls: list[Call], order: Any) -> None:
        repeated = calls * 2
        order.shuffle(repeated)
        by_plan = [(call, outcome(call.run)) for call in repeated]
        expected = {id(call): unplanned(call.run) for call in calls}
        for call, found in by_plan:
            assert found == expected[id(call)]

    compare()
    assert len(ran) > 50  # else plans were hardly compared with anything


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BASE, Call(shape=(1, 4, 5, 7, 2, 64))),
        (BASE, Call(kv_heads=1)),
        (BASE, Call(dtype=torch.float16)),
        (BASE, Call(strides="part")),
        (BASE, Call(strides="odd address")),
        (BASE, GATED),
        (Call(gates=("contiguous", None)), Call(gates=(None, "contiguous"))),
        (GATED, Call(gates=("fp32", "contiguous"))),
        (GATED, Call(gates=("contiguous", "channels outside"))),
        (GATED, Call(gates=("contiguous", "odd address"))),
        (GATED, Call(gates=("contiguous", "broadcast"))),
        *(
            (Call(gates=(a, b)), Call(gates=(b, a)))
            for a, b in permutations(dict.fromkeys(GATES), 2)
        ),
        *((Call(gates=(a, a)), Call(gates=(a, a), wants="qfc")) for a in dict.fromkeys(GATES)),
        (Call(gates=("expanded", None), wants="q"), Call(gates=("expanded", None), wants="qf")),
        (BASE, Call(score=vsa.SubBlocks(4))),
        (Call(score=vsa.SubBlocks(4), wants="q"), Call(score=vsa.SubBlocks(3), wants="q")),
        (BASE, Call(autocast=True)),
        (BASE, Call(autocast=torch.float16)),
        (Call(autocast=torch.float16), Call(dtype=torch.float16)),
        (Call(autocast=torch.float16, wants="qk"), Call(autocast=True, wants="qk")),
        (BASE, Call(topk=1)),
        (Call(topk=1), Call(topk=1.0)),
        (Call(topk=1), Call(topk=True)),
        (Call(topk=(1, 2)), Call(topk=(1.0, 2))),
        (Call(topk=(1, 2)), Call(topk=(True, 2))),
        (Call(topk=TopP(0.5)), Call(topk=TopP(0.5, 1.0))),
        (Call(topk=TopP(0.5)), Call(topk=TopP(0.9))),
        (BASE, Call(scale=0.25)),
        (Call(scale=1), Call(scale=True)),
        (Call(scale=1), Call(scale=1 + 0j)),
        (BASE, Call(tail=True)),
        (Call(tail=True), Call(tail=1)),
        (Call(tail=True, wants="qkv"), Call(tail=None, wants="qkv")),
        (BASE, Call(tile=(2, 4, 4))),
        (BASE, Call(tile=(4.0, 4, 4))),
        (Call(FLAT), Call(FLAT, grid=(5, 4, 6))),
        (Call(FLAT), Call(FLAT, grid=(4.0, 5, 6))),
        (Call(FLAT, grid=vsa.Grid((4, 5, 6))), Call(FLAT, grid=vsa.Grid((4, 5, 6), (2, 4, 4)))),
        (BASE, TRAINED),
        (TRAINED, BASE),
        (TEXT, Call(text=(5, 3))),
        (TEXT, Call(text=(4, 4))),
        (TEXT, MASKED),
        (MASKED, TEXT),
        (MASKED, MASKED._replace(valid="none")),
        *((MASKED._replace(valid=a), MASKED._replace(valid=b)) for a, b in permutations(MASKS, 2)),
        (MASKED, MASKED._replace(wants="qkv")),
        (BASE, Call(given="contiguous")),
        (Call(given="contiguous"), BASE),
        *((Call(given=a), Call(given=b)) for a, b in permutations(BITMAPS, 2)),
        (Call(wants="qkv", given=BITMAPS[4]), Call(wants="qkv", given=BITMAPS[3])),
        (Call(given="contiguous"), Call(given="contiguous", gates=(None, "contiguous"))),
        *((BASE, Call(strides=strides)) for strides in STRIDES),
        *((Call(strides=strides, wants="qkv"), TRAINED) for strides in STRIDES),
    ],
)
def test_calls_that_differ_in_one_thing(first: Call, second: Call, ran: list[int]) -> None:
    assert outcome(first.run) == outcome(first.run) == unplanned(first.run)
    assert len(ran) == 1
    expected = unplanned(second.run)
    assert outcome(second.run) == outcome(second.run) == expected


def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return vsa.attention(q, k, v, **{"topk": 2, "backend": "emulated"} | options)


def changed(**changes: Callable[[Tensor], Any]) -> Callable[[], list[Any]]:
    """A call of which some arguments are made of what they would be."""

    def run() -> list[Any]:
        given = dict(zip("qkv", GATED.tensors(), strict=False))
        found = attend(**given | {name: make(given.get(name)) for name, make in changes.items()})
        return (
            [*found[:1], *(getattr(x, "bitmap", x) for x in found[1:])]
            if isinstance(found, tuple)
            else [found]
        )

    return run


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    "run",
    [
        changed(q=lambda q: None),
        changed(k=lambda k: None),
        changed(v=lambda v: v[:, :3]),
        changed(v=lambda v: v.half()),
        changed(k=lambda k: k.to("meta")),
        changed(q=lambda q: q.to_sparse()),
        changed(q=freed),  # a kernel that read it would end the process
        changed(q=lambda q: torch._efficientzerotensor(q.shape, dtype=q.dtype)),
        changed(q=lambda q: torch._neg_view(q)),
        changed(q=lambda q: strided(q, "heads outside")),
        changed(q=lambda q: q[..., :1, :].expand(q.shape)),
        changed(gate_fine=lambda _: torch.ones(VIDEO, dtype=torch.float16)),
        changed(gate_coarse=lambda _: torch.linspace(0, 1, 64).expand(VIDEO)),
        changed(kv_grid=lambda _: (4, 6, 5)),
        changed(kv_grid=lambda _: (4, 5, 6)),
        changed(kv_grid=lambda _: (4.0, 5, 6)),
        changed(scale=lambda _: 0),
        changed(scale=lambda _: -0.125),
        changed(topk=lambda _: [2, 2]),
        changed(topk=lambda _: (2, [2])),
        changed(topk=lambda _: torch.tensor(2)),
        changed(backend=lambda _: "torch"),
        changed(return_lse=lambda _: 0.0),
        changed(return_lse=lambda _: []),
        changed(return_selection=lambda _: True),
        changed(return_lse=lambda _: True),
        changed(backend=lambda _: "nobody"),
        changed(score=lambda _: vsa.SubBlocks(1)),
        changed(score=lambda _: vsa.SubBlocks(4)),
        changed(score=lambda _: 4),
        changed(score=lambda _: []),
        changed(score=lambda _: "max"),
        changed(grid=lambda _: vsa.Grid((4, 5, 6), prefix=1)),
        changed(text_valid=lambda _: torch.ones(1, 0, dtype=torch.bool)),
        changed(text_valid=lambda _: torch.ones(1, 3, dtype=torch.bool)),
        changed(text_valid=lambda _: torch.ones(1, 0)),
        changed(text_valid=lambda _: True),
        changed(selection=lambda _: 2),
        changed(selection=lambda _: vsa.Selection(None, 4)),
        changed(selection=lambda _: vsa.Selection.from_mask(torch.ones(1, 2, 4, 4) > 0)),
        changed(selection=lambda _: vsa.Selection.from_mask(torch.ones(1, 2, 5, 4) > 0)),
        changed(selection=lambda _: vsa.Selection(torch.ones(1, 2, 4, 1).int(), 4.0)),
        changed(selection=lambda _: vsa.Selection(torch.ones(1, 2, 4, 1).int(), 4, grid=[4, 5, 6])),
        changed(selection=lambda _: vsa.Selection(torch.ones(1, 2, 4, 1).long(), 4)),
    ],
)
def test_arguments_that_only_look_like_those_of_a_plan(
    run: Callable[[], Any], ran: list[int]
) -> None:
    expected = unplanned(run)
    for _ in range(2):
        BASE.run()
        assert outcome(run) == expected
    assert len(ran) >= 1


def test_results_that_were_not_asked_for_before(ran: list[int]) -> None:
    for options in ({}, {"return_lse": True}, {"return_selection": True}):
        run = changed(**{name: lambda _, value=value: value for name, value in options.items()})
        assert outcome(run) == outcome(run) == unplanned(run)
    assert len(ran) == 3


def test_more_budgets_of_heads_than_the_kernel_takes(ran: list[int]) -> None:
    call = Call((1, 4, 4, 8, 300, 64), kv_heads=300, topk=(1,) * 300)
    assert outcome(call.run) == outcome(call.run) == unplanned(call.run)


HASHES = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from python.planned_calls import OF_A_FRESH_PROCESS, digest
print(*(digest(call) for call in OF_A_FRESH_PROCESS))
"""


@pytest.mark.parametrize("size", [16, 100], ids=["a row", "some"])
def test_scores_in_several_slices(
    size: int, monkeypatch: pytest.MonkeyPatch, ran: list[int]
) -> None:
    for module in (coarse_select, prepared_coarse):
        monkeypatch.setattr(module, "SCORE_BYTES", size)
    for module in (coarse_backward, prepared_coarse):
        monkeypatch.setattr(module, "PROBABILITY_BYTES", size)
    calls = [BASE, ALL, ALL._replace(kv_heads=1), GATED._replace(topk=TopP(0.5))]
    for call in (*calls, ALL._replace(kv_heads=1, given="contiguous")):
        same_by_a_plan(call.run, ran)


def test_a_direction_crosses_once(monkeypatch: pytest.MonkeyPatch, ran: list[int]) -> None:
    machine, crossings = machine_of("cpu"), []
    run = machine.run_program
    kinds = [BASE, GATED, TRAINED, ALL, MASKED, ALL._replace(text=(5, 70), valid="some")]
    kinds += [ALL._replace(given="contiguous")]
    kinds += [ALL._replace(strides=strides) for strides in STRIDES]
    for call in kinds:
        directions = 2 if call.wants else 1
        call.run()
        crossings.clear()
        with monkeypatch.context() as counting:
            counting.setattr(machine, "run", lambda *_: pytest.fail("a call of its own"))
            counting.setattr(
                machine, "run_program", lambda *given: (crossings.append(1), run(*given))
            )
            call.run()
        assert len(crossings) == directions


def test_a_fresh_process_gives_the_same(ran: list[int], pytestconfig: pytest.Config) -> None:
    for call in OF_A_FRESH_PROCESS:
        call.run()
    here = [digest(call) for call in OF_A_FRESH_PROCESS]
    assert len(ran) == len(OF_A_FRESH_PROCESS)
    tests = pytestconfig.rootpath / "tests"
    there = subprocess.run(
        [sys.executable, "-c", HASHES, tests], capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == here


def test_the_oldest_kind_is_forgotten(ran: list[int]) -> None:
    eager._plans.most = 3
    calls = [Call(scale=scale) for scale in (0.1, 0.2, 0.3, 0.4)]
    first = [outcome(call.run) for call in calls]
    assert len(eager._plans.values) == 3 and not ran
    assert [outcome(call.run) for call in calls[1:]] == first[1:] and len(ran) == 3
    assert outcome(calls[0].run) == first[0] and len(ran) == 3
    assert len(eager._plans.values) == 3


@pytest.mark.parametrize("wants", ["", "qkvfc"])
@pytest.mark.parametrize("texts", [((3, 0), (0, 70)), ((0, 0), (66, 1)), ((5, 5), (0, 0))])
def test_keys_with_a_grid_and_a_text_of_their_own(
    texts: tuple[tuple[int, int], tuple[int, int]], wants: str, ran: list[int]
) -> None:
    grid, kv_grid = (
        vsa.Grid((4, 5, 6), (4, 4, 4), *texts[0]),
        vsa.Grid((3, 6, 9), "auto", *texts[1]),
    )

    def run() -> list[Any]:
        generator = torch.Generator().manual_seed(5)
        lengths = zip("qkvfc", (grid, kv_grid, kv_grid, grid, grid), strict=True)
        x = {
            name: torch.randn(2, each.length, 2, 64, generator=generator).bfloat16()
            for name, each in lengths
        }
        leaves = [each.requires_grad_(name in wants) for name, each in x.items()]
        q, k, v, gate_fine, gate_coarse = leaves
        gates = {"gate_fine": gate_fine, "gate_coarse": gate_coarse}
        out = attend(q, k, v, grid=grid, kv_grid=kv_grid, **gates)
        return [out, *torch.autograd.grad(out.sum(), leaves)] if wants else [out]

    same_by_a_plan(run, ran)
