# SPDX-License-Identifier: Apache-2.0
"""Bad input: one sentence that names the argument, before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # has the backend "fake"
from python.no_work import NoWork, is_named

import vsa
from vsa import diagnostics
from vsa.distributed import ring_attention, ulysses_attention
from vsa.operators import coarse_select as ops
from vsa.values import checks

Q = torch.randn(1, 4, 4, 8, 2, 16)
META = Q.to("meta")
FLAT = Q.flatten(1, 3)
SHORT = FLAT[:, :64]
GRID = vsa.Grid((4, 4, 8))
MASK = torch.ones(1, 2, 2, 2, dtype=torch.bool)
SELECTION = vsa.select(Q, Q, 1)
TEXT = vsa.Grid((4, 4, 8), prefix=2)
WITH_TEXT = torch.randn(1, TEXT.length, 2, 16)
VALID = torch.ones(1, 2, dtype=torch.bool)
LAYER = partial(vsa.nn.VideoSparseAttention, 32, 4)
X = torch.randn(1, 4, 4, 8, 32)


@dataclass(frozen=True)
class Case:
    """A call that must be refused; its arguments are made before anybody watches.

    Attributes:
        name: the argument that is at fault.
        kind: the exception.
        call: what raises it.
        projections: whether a layer's projections come first.
    """

    name: str
    kind: type[Exception]
    call: Callable[[], object]
    projections: bool = False


def case(
    name: str, kind: type[Exception], call: Callable[..., object], *args: Any, **options: Any
) -> Case:
    return Case(name, kind, partial(call, *args, **options), isinstance(call, torch.nn.Module))


def attend(q: Any = Q, k: Any = Q, v: Any = Q, topk: Any = 1, **options: Any) -> object:
    return vsa.attention(q, k, v, topk, **options)


def fine(q: Any = Q, k: Any = Q, v: Any = Q, selection: Any = SELECTION, **options: Any) -> object:
    return vsa.block_sparse_attention(q, k, v, selection, **options)


def shard(q: Any = SHORT, k: Any = SHORT, v: Any = SHORT, topk: Any = 1, **options: Any) -> object:
    """This rank's half of a sequence."""
    return ulysses_attention(q, k, v, topk, **{"grid": (4, 4, 8)} | options)


flat = partial(attend, FLAT, FLAT, FLAT)
text = partial(attend, WITH_TEXT, WITH_TEXT, WITH_TEXT, grid=TEXT)

TENSORS = [
    case("q", TypeError, attend, q="video"),
    case("q", ValueError, attend, q=Q[0]),
    case("q", ValueError, attend, q=Q[:0]),
    case("q", TypeError, attend, q=Q.long()),
    case("q", TypeError, attend, q=Q.to(torch.complex64)),
    case("q", ValueError, attend, q=Q.transpose(-1, -2)),
    case("q", ValueError, flat, grid=(4, 4, 9)),
    case("grid", ValueError, flat, grid=(4, 4, 9)),
    case("k", TypeError, attend, k=None),
    case("v", TypeError, attend, v=None),
    case("v", TypeError, fine, v=None),
    case("k", ValueError, attend, k=Q[0]),
    case("k", TypeError, attend, k=Q.bfloat16()),
    case("k", ValueError, attend, k=META),
    case("k", ValueError, attend, k=FLAT, v=FLAT),
    case("k", ValueError, attend, k=Q[..., :8], v=Q[..., :8]),
    case("k", ValueError, attend, q=Q[..., :1, :], k=Q, v=Q),
    case("k", ValueError, attend, k=Q[:, :, :, :4], v=Q[:, :, :, :4]),
    case("k", ValueError, flat, grid=(4, 4, 8), kv_grid=(4, 4, 4)),
    case("v", TypeError, attend, v=Q.tolist()),
    case("v", ValueError, attend, v=Q[:, :2]),
    case("v", TypeError, attend, v=Q.double()),
    case("v", ValueError, attend, v=META),
    case("gate_coarse", ValueError, attend, gate_coarse=torch.ones(3)),
    case("gate_coarse", TypeError, attend, gate_coarse=0.5),
    case("gate_coarse", TypeError, attend, gate_coarse=torch.ones(1, dtype=torch.long)),
    case("gate_coarse", TypeError, attend, gate_coarse=torch.ones(1, dtype=torch.bool)),
    case("gate_coarse", ValueError, attend, gate_coarse=META),
    case("gate_coarse", ValueError, flat, grid=(4, 4, 8), gate_coarse=Q),
    case("gate_fine", ValueError, attend, gate_fine=torch.ones(1, 1, 1, 1, 1, 2, 16)),
    case("gate_fine", TypeError, attend, gate_fine="none"),
    case("gate_fine", TypeError, attend, gate_fine=torch.ones(1, dtype=torch.complex64)),
    case("gate_fine", ValueError, attend, gate_coarse=Q, gate_fine=META),
    *(
        case("tail", TypeError, call, tail=tail)
        for call in (attend, fine)
        for tail in (None, 1, "mean", torch.tensor(True))
    ),
    case("text_valid", TypeError, text, text_valid=torch.ones(1, 2)),
    case("text_valid", TypeError, text, text_valid=[[True, True]]),
    case("text_valid", ValueError, attend, text_valid=torch.ones(1, 3).bool()),
    case("text_valid", ValueError, text, text_valid=VALID.to("meta")),
    case(
        "text_valid", ValueError,
        attend, WITH_TEXT, FLAT, FLAT, grid=TEXT, kv_grid=(4, 4, 8), text_valid=VALID,
    ),
]  # fmt: skip

SIXTEEN = torch.randn(1, 4, 4, 8, 2, 64, dtype=torch.bfloat16)
WANTING = SIXTEEN.clone().requires_grad_()
eight = partial(attend, q=SIXTEEN, k=SIXTEEN, v=SIXTEEN, precision="int8")

PRECISIONS = [
    *(
        case("precision", ValueError, call, precision=precision)
        for call in (attend, fine)
        for precision in ("int4", "INT8", "", None, True, torch.int8)
    ),
    case("q", TypeError, attend, precision="int8"),
    case("q", TypeError, fine, precision="fp8"),
    case("q", TypeError, attend, *(SIXTEEN.double(),) * 3, precision="fp8"),
    case("q", ValueError, attend, *(SIXTEEN[..., :32],) * 3, precision="int8"),
    case("q", ValueError, eight, q=WANTING),
    case("k", ValueError, eight, k=WANTING),
    case("v", ValueError, eight, v=WANTING),
    case("gate_coarse", ValueError, eight, gate_coarse=WANTING),
    case("gate_fine", ValueError, eight, gate_fine=WANTING),
    case("gate_fine", TypeError, eight, gate_fine="none"),
    case("backend", RuntimeError, eight, backend="flex"),
    case("v", ValueError, fine, SIXTEEN, SIXTEEN, WANTING, precision="int8"),
]

BUDGETS = [
    *(
        case("topk", kind, attend, topk=topk)
        for kind, topk in (
            (ValueError, 0), (ValueError, -3), (ValueError, 0.0), (ValueError, 1.5),
            (ValueError, float("nan")), (TypeError, "32"), (TypeError, True), (TypeError, None),
            (ValueError, (1, 2, 3)), (ValueError, ()),
        )
    ),
    case("topk[1]", ValueError, attend, topk=(1, 0)),
    case("topk[0]", TypeError, vsa.select, Q, Q, ("few", 1)),
    case("topk", ValueError, vsa.flops, (4, 4, 4), 2, 64, vsa.TopP(0.9)),
    case("heads", ValueError, vsa.flops, (4, 4, 4), 0, 64, 1),
    case("tail", TypeError, vsa.flops, (4, 4, 4), 2, 64, 1, tail="yes"),
    case("mass", ValueError, vsa.TopP, 0.0),
    case("mass", ValueError, vsa.TopP, 90),
    case("mass", TypeError, vsa.TopP, "most"),
    case("floor", ValueError, vsa.TopP, 0.9, 0),
    case("floor", ValueError, vsa.TopP, 0.9, 1.5),
    case("floor", TypeError, vsa.TopP, 0.9, None),
    case("end", ValueError, vsa.SparsityRamp, start=0.1, end=0.5),
    case("every", ValueError, vsa.SparsityRamp, every=0),
    case("step", ValueError, vsa.SparsityRamp, step=0.0),
    case("step", ValueError, vsa.SparsityRamp(), -1),
]  # fmt: skip

GRIDS = [
    case("grid", ValueError, attend, grid=(4, 8, 4)),
    case("grid", TypeError, flat, grid=(4, 32)),
    case("grid", TypeError, flat, grid=128),
    case("grid", ValueError, attend, grid=TEXT),
    case("grid[0]", ValueError, vsa.Grid, (0, 4, 4)),
    case("grid[2]", TypeError, vsa.Grid, (4, 4, 4.0)),
    case("kv_grid", TypeError, attend, kv_grid="same"),
    case("kv_grid", ValueError, attend, kv_grid=(4, 4, 4)),
    case("kv_grid[1]", ValueError, flat, grid=(4, 4, 8), kv_grid=(4, -4, 8)),
    case("kv_grid", ValueError, flat, grid=(4, 4, 8), kv_grid=(4, 4, 4)),
    case("kv_grid", ValueError, flat, grid=(4, 4, 8), kv_grid=TEXT),
    case("kv_grid", ValueError, fine, FLAT, SHORT, SHORT, selection=SELECTION, kv_grid=(4, 4, 8)),
    case("selection", ValueError, fine, SHORT, SHORT, SHORT),
    case("tile", ValueError, attend, tile=(4, 4, 5)),
    case("tile", ValueError, attend, tile="best"),
    case("tile", TypeError, attend, tile=4),
    case("tile[1]", ValueError, attend, tile=(4, 0, 4)),
    case("tile", ValueError, attend, grid=GRID, tile=(2, 4, 8)),
    case("prefix", ValueError, vsa.Grid, (4, 4, 4), prefix=-1),
    case("suffix", TypeError, vsa.Grid, (4, 4, 4), suffix=1.5),
    case("shape[0]", ValueError, vsa.best_tile, (0, 4, 4)),
    case("x", ValueError, GRID.to_tiles, torch.ones(1, 127)),
    case("x", ValueError, GRID.from_tiles, torch.ones(1, 3, 64)),
]

OPTIONS = [
    case("scale", TypeError, attend, scale="auto"),
    case("scale", ValueError, attend, scale=float("inf")),
    case("scale", ValueError, attend, *[Q[:, :, :, :4]] * 3, scale=float("-inf")),
    case("backend", ValueError, attend, backend="fastest"),
    case("backend", ValueError, attend, backend=None),
    case("backend", ValueError, attend, *[Q[:, :, :, :4]] * 3, backend="fast"),
    case("backend", RuntimeError, attend, backend="hopper"),
    case("backend", RuntimeError, attend, backend="emulated"),
    case("backend", RuntimeError, attend, Q.clone().requires_grad_(), backend="flex"),
]

SELECTIONS = [
    case("selection", TypeError, attend, selection=MASK),
    case("selection", ValueError, attend, selection=vsa.Selection.from_mask(MASK[:, :1])),
    case("selection", ValueError, attend, selection=SELECTION.to("meta")),
    case("selection", ValueError, attend, grid=GRID, selection=vsa.select(Q, Q, 1, tile=(2, 4, 8))),
    case(
        "selection", ValueError,
        attend, Q, Q, Q, grid=GRID, kv_grid=GRID,
        selection=replace(SELECTION, kv_grid=vsa.Grid((4, 8, 4))),
    ),
    case("selection", ValueError, attend, selection=vsa.Selection(SELECTION.bitmap.float(), 2)),
    case(
        "selection", ValueError,
        attend, selection=vsa.Selection(torch.ones(1, 2, 2, 3, dtype=torch.int32), 2),
    ),
    case("must", TypeError, vsa.select, Q, Q, 1, must=torch.ones(2, 2)),
    case("must", ValueError, vsa.select, Q, Q, 1, must=torch.ones(2, 3).bool()),
    case("must", ValueError, vsa.select, Q, Q, 1, must="diagonal"),
    case("must", ValueError, vsa.select, Q, Q, 1, must=torch.ones(2, 2).bool().to("meta")),
    case("must", ValueError, vsa.select, FLAT, SHORT, 1, grid=GRID, kv_grid=(4, 4, 4), must="self"),
    case("k", ValueError, vsa.select, Q, META, 1),
    case("mask", TypeError, vsa.Selection.from_mask, MASK.float()),
    case("mask", ValueError, vsa.Selection.from_mask, MASK[0]),
    case("mask", ValueError, vsa.Selection.from_mask, MASK, grid=vsa.Grid((4, 4, 4))),
    case("mask", ValueError, vsa.Selection.from_mask, MASK, GRID, vsa.Grid((4, 4, 4))),
    case("q", ValueError, SELECTION.recall, FLAT[..., :8], FLAT),
    case("k", ValueError, SELECTION.recall, Q, META),
]  # fmt: skip

FINE_STAGE = [
    case("selection", TypeError, fine, selection=None),
    case("selection", TypeError, fine, selection="all"),
    case("selection", ValueError, fine, *[Q[..., :4, :, :]] * 3, vsa.Selection.from_mask(MASK)),
    case("selection", ValueError, fine, selection=SELECTION.to("meta")),
    case("q", TypeError, fine, q=None),
    case("k", TypeError, fine, k=Q.bfloat16()),
    case("v", ValueError, fine, v=Q[..., :8]),
    case("grid", TypeError, fine, grid="selection"),
    case("tile", ValueError, fine, grid=GRID, tile=(1, 8, 8)),
    case("scale", ValueError, fine, scale=float("nan")),
    case("text_valid", ValueError, fine, text_valid=VALID),
    case("backend", RuntimeError, fine, backend="hopper"),
]

LAYERS = [
    case("dim", ValueError, vsa.nn.VideoSparseAttention, 30, 4),
    case("dim", TypeError, vsa.nn.VideoSparseAttention, 32.0, 4),
    case("heads", ValueError, vsa.nn.VideoSparseAttention, 32, 0),
    case("kv_heads", ValueError, LAYER, kv_heads=3),
    case("kv_heads", TypeError, LAYER, kv_heads="2"),
    case("tail", TypeError, LAYER, tail=1),
    case("gates", ValueError, LAYER, gates="fine"),
    case("topk", ValueError, LAYER, topk=0),
    case("topk", ValueError, LAYER, topk=(1, 2)),
    case("topk", TypeError, LAYER, topk="few"),
    case("tile", ValueError, LAYER, tile=(4, 8, 8)),
    case("tile", ValueError, LAYER, tile="best"),
    case("backend", ValueError, LAYER(backend="fastest"), X),
    case("x", ValueError, LAYER(), torch.ones(1, 64, 16)),
    case("x", TypeError, LAYER(), X.long()),
    case("x", TypeError, LAYER(), None),
    case("grid", TypeError, LAYER(), X, grid=(4, 4)),
    case("selection", TypeError, LAYER(), X, selection=MASK),
    case("text_valid", ValueError, LAYER(), X, text_valid=VALID),
]

DIAGNOSTICS = [
    case("a", ValueError, diagnostics.overlap, SELECTION, vsa.Selection.from_mask(MASK[:, :1])),
    case("selection", ValueError, diagnostics.neighbour_overlap, vsa.Selection.from_mask(MASK)),
    case(
        "selection", ValueError,
        diagnostics.sampled_recall, vsa.Selection.from_mask(MASK), FLAT, FLAT, tiles=1,
    ),
    case("q", ValueError, diagnostics.sampled_recall, SELECTION, SHORT, FLAT, tiles=1),
    case("k", ValueError, diagnostics.sampled_recall, SELECTION, FLAT, SHORT, tiles=1),
    case("tiles", ValueError, diagnostics.sampled_recall, SELECTION, FLAT, FLAT, tiles=0),
    case("topks", ValueError, diagnostics.recall_curve, Q, Q, []),
    case("topks", ValueError, diagnostics.recall_curve, Q, Q, 3),
    case("topk", ValueError, diagnostics.recall_curve, Q, Q, [1, 0]),
    case("k", TypeError, diagnostics.recall_curve, Q, Q.double(), [1]),
]  # fmt: skip

SHARDS = [
    case("q", TypeError, shard, q=None),
    case("q", ValueError, shard, q=Q),
    case("q", ValueError, shard, q=FLAT),
    case("q", ValueError, shard, *[SHORT[:, :, :1]] * 3),
    case("k", ValueError, shard, k=FLAT),
    case("k", ValueError, shard, k=SHORT.to("meta")),
    case("v", ValueError, shard, v=FLAT),
    case("topk", ValueError, shard, topk=0),
    case("topk", ValueError, shard, topk=(1, 2, 3)),
    case("group", TypeError, shard, group="all"),
    case("grid", TypeError, shard, grid=(4, 32)),
    case("kv_grid", TypeError, shard, kv_grid="same"),
    case("tile", ValueError, shard, grid=GRID, tile=(2, 4, 8)),
    case("lengths", TypeError, shard, lengths=64),
    case("lengths", ValueError, shard, lengths=[64, 65]),
    case("lengths[1]", ValueError, shard, lengths=[128, 0]),
    case("kv_lengths", ValueError, shard, kv_lengths=[64]),
    case("tail", TypeError, shard, tail=None),
    case("gate_coarse", ValueError, shard, gate_coarse=torch.ones(3)),
    case("gate_fine", ValueError, shard, gate_fine=SHORT.to("meta")),
    case("scale", TypeError, shard, scale="auto"),
    case("selection", TypeError, shard, selection=MASK),
    case("text", ValueError, shard, text="whole"),
    case("text_valid", ValueError, shard, text_valid=VALID),
    case("backend", ValueError, shard, backend="fastest"),
]

CASES = [
    *TENSORS, *PRECISIONS, *BUDGETS, *GRIDS, *OPTIONS, *SELECTIONS, *FINE_STAGE, *LAYERS,
    *DIAGNOSTICS,
    case("group", RuntimeError, shard),
    case("ring_attention", NotImplementedError, ring_attention, Q, Q, Q, 1),
]  # fmt: skip


def _ids(cases: list[Case]) -> list[str]:
    return [f"{index}-{each.name}" for index, each in enumerate(cases)]


def _is_refused(wrong: Case) -> None:
    with pytest.raises(wrong.kind) as caught, NoWork(wrong.projections):
        wrong.call()
    sentence = str(caught.value)
    assert is_named(wrong.name, sentence), sentence
    assert len(sentence.split()) >= 5 and "\n" not in sentence


@pytest.mark.parametrize("wrong", CASES, ids=_ids(CASES))
def test_bad_input_is_named_before_any_work(wrong: Case) -> None:
    _is_refused(wrong)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Q.numpy(), "a numpy.ndarray of shape (1, 4, 4, 8, 2, 16)"),
        (Q.tolist(), "a list of length 1"),
        (1.0, "1.0 of type float"),
    ],
    ids=["numpy", "list", "number"],
)
def test_what_is_no_tensor_is_told_by_its_type_and_shape(given: object, words: str) -> None:
    with pytest.raises(TypeError) as raised:
        attend(q=given)
    assert str(raised.value) == f"q must be a torch.Tensor, but it is {words}"


@pytest.fixture
def one_of_two_ranks() -> Iterator[None]:
    """A process group whose other rank does not exist."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_of_two_ranks")
@pytest.mark.parametrize("wrong", SHARDS, ids=_ids(SHARDS))
def test_bad_shards_are_named_before_anything_is_communicated(wrong: Case) -> None:
    _is_refused(wrong)


@pytest.mark.parametrize("wrong", [case for case in TENSORS if case.name.startswith("gate_")])
def test_work_before_a_check_of_gates_would_be_seen(
    wrong: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checks.gate

    def after_means(name: str, value: Any, q: torch.Tensor) -> None:
        ops.tile_means([FLAT], GRID.as_ints(), "torch")
        check(name, value, q)

    monkeypatch.setattr(checks, "gate", after_means)
    with pytest.raises(pytest.fail.Exception, match=r"vsa\.tile_means\.default ran"):
        _is_refused(wrong)
