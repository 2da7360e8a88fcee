# SPDX-License-Identifier: Apache-2.0
"""Gradients of remembered calls: hooks, checkpoints, any upstream, more than one backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from python.planned_calls import (
    ALL,
    FLAT,
    VIDEO,
    Call,
    attention,
    given,
    outcome,
    same_by_a_plan,
    slopes,
    strided,
    unplanned,
    without_plans,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import vsa
from vsa.stages import eager
from vsa.values.score import Score


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return without_plans(monkeypatch)


def clone(x: Tensor) -> Tensor:
    return x.clone()


def transposed(x: Tensor) -> Tensor:
    # Only tokens: PyTorch multiplies tile means in an order of their strides.
    return x.mT.contiguous().mT if x.dtype == torch.bfloat16 else x.clone()


def inside(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(256), x.flatten(), x.new_zeros(256)))[256:-256].view(x.shape)


def widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


@pytest.mark.parametrize(
    "pack",
    [
        clone,
        transposed,
        partial(strided, kind="odd address"),
        inside,
        widened,  # an error, never other numbers
    ],
)
@pytest.mark.parametrize("shape", [VIDEO, FLAT])
def test_hooks_of_saved_tensors(
    pack: Callable[[Tensor], Tensor], shape: tuple[int, ...], ran: list[int]
) -> None:
    call = ALL._replace(shape=shape)
    hooks = pack, lambda x: x

    def run() -> list[Any]:
        tensors = given(call)
        with saved_tensors_hooks(*hooks):
            out = attention(**tensors, grid=(4, 5, 6))
        return slopes(out, tensors)

    def run_with_late_hooks() -> list[Any]:
        tensors = given(call)
        out = attention(**tensors, grid=(4, 5, 6))
        for saved in out.grad_fn._raw_saved_tensors:
            if saved.data is not None:
                saved.register_hooks(*hooks)
        return slopes(out, tensors)

    attention(**given(call), grid=(4, 5, 6))
    assert outcome(run) == outcome(run) == unplanned(run)
    assert len(ran) == 1
    assert outcome(run_with_late_hooks) == unplanned(run)
    assert len(ran) == 2


def test_hooks_that_change_the_keys_alone(ran: list[int]) -> None:
    call = Call((1, 4, 5, 6, 4, 64), kv_heads=2, wants="qkv")

    def run(late: bool) -> list[Any]:
        tensors = given(call)
        hooks = (lambda x: transposed(x) if x.shape[-2:] == (2, 64) else x), lambda x: x
        with contextlib.nullcontext() if late else saved_tensors_hooks(*hooks):
            out = attention(**tensors)
        if late:
            for saved in out.grad_fn._raw_saved_tensors:
                if saved.data is not None:
                    saved.register_hooks(*hooks)
        return slopes(out, tensors)

    attention(**given(call))
    assert outcome(lambda: run(late=True)) == unplanned(lambda: run(late=False))
    assert len(ran) == 1


@pytest.mark.parametrize("shape", [VIDEO, FLAT])
@pytest.mark.parametrize(
    "gates", [(None, None), ("contiguous", None), (None, "fp32"), ("fp32", "contiguous")]
)
@pytest.mark.parametrize("check", ["default", "none"])
@pytest.mark.parametrize("score", ["mean", vsa.SubBlocks(4)])
def test_checkpoints_of_which_one_forward_has_a_plan(
    shape: tuple[int, ...],
    gates: tuple[str | None, str | None],
    check: str,
    score: Score,
    ran: list[int],
) -> None:
    call = Call(shape, gates=gates, wants="qkvfc", grid=(4, 5, 6))

    def run(with_plan: tuple[bool, bool]) -> list[Any]:
        forwards = iter(with_plan)

        def attend(*values: Tensor | None) -> Tensor:
            with contextlib.nullcontext() if next(forwards) else eager.paused():
                named = dict(zip(tensors, values, strict=True))
                return attention(**named, grid=(4, 5, 6), score=score)

        tensors = given(call)
        out = checkpoint(attend, *tensors.values(), use_reentrant=False, determinism_check=check)
        return slopes(out.float().square(), tensors)

    expected = outcome(lambda: run((False, False)))
    assert isinstance(expected, list)
    assert outcome(lambda: run((True, True))) == expected
    assert len(ran) == 1  # the first forward has left a plan to the second
    for with_plan in ((True, True), (True, False), (False, True)):
        ran.clear()
        assert outcome(lambda each=with_plan: run(each)) == expected
        assert len(ran) == sum(with_plan)


@pytest.mark.parametrize(
    "change",
    [
        torch._neg_view,
        partial(strided, kind="odd address"),
        transposed,
        lambda x: x[:1, :1, :1, :1, :1, :1].expand(x.shape),
        torch.Tensor.float,
    ],
)
@pytest.mark.parametrize("call", [ALL, Call(wants="qkv")])
def test_gradients_that_kernels_cannot_read(
    change: Callable[[Tensor], Tensor], call: Call, ran: list[int]
) -> None:
    def run() -> list[Any]:
        tensors = given(call)
        out = attention(**tensors)
        numbers = torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype)
        return slopes(out, tensors, change(numbers))

    same_by_a_plan(run, ran)


def twice(run: Callable[..., Any]) -> Callable[[], Any]:
    """A run on fresh tensors and their output."""

    def on_tensors() -> Any:
        tensors = given()
        return run(attention(**tensors), tensors)

    return on_tensors


def second_derivative(out: Tensor, tensors: dict[str, Any]) -> list[Any]:
    grads = torch.autograd.grad(out.float().square().sum(), tensors["q"], create_graph=True)
    return [torch.autograd.grad(grads[0].float().sum(), tensors["v"])]


def first_derivative(out: Tensor, tensors: dict[str, Any]) -> list[Any]:
    return list(torch.autograd.grad(out.sum(), list(tensors.values()), create_graph=True))


def two_backwards(out: Tensor, tensors: dict[str, Any], keep: bool) -> list[Any]:
    out.sum().backward(retain_graph=keep)
    out.sum().backward()
    return [x.grad for x in tensors.values()]


def many_gradients(out: Tensor, tensors: dict[str, Any]) -> list[Any]:
    upstream = torch.stack([torch.ones_like(out), -torch.ones_like(out)])
    return list(
        torch.autograd.grad(
            out, [tensors["q"], tensors["gate_fine"]], upstream, is_grads_batched=True
        )
    )


def under_autocast(out: Tensor, tensors: dict[str, Any]) -> list[Any]:
    with torch.autocast("cpu", torch.float16):
        return slopes(out, tensors)


def test_changes_in_place_of_what_is_no_token(ran: list[int]) -> None:
    call = Call(text=(5, 66), valid="some", given="contiguous", wants="qkv")

    def run(change: str) -> list[Any]:
        tensors, mask = given(call), call.mask()
        selection = call.selection(tensors["q"], tensors["k"])
        options = {"grid": call.extent, "text_valid": mask, "selection": selection}
        out = attention(**tensors, **options | {"topk": None})
        if change == "mask":
            mask.fill_(True)
        elif change == "bitmap":
            selection.bitmap.zero_()
        return slopes(out, tensors)

    for change in ("nothing", "mask", "bitmap"):
        same_by_a_plan(partial(run, change), ran)
        assert isinstance(outcome(partial(run, change)), list) == (change == "nothing")


@pytest.mark.parametrize("change", ["nothing", "q", "v"])
@pytest.mark.parametrize("strides", ["odd address", "axes exchanged", "tokens of 136 bytes"])
def test_changes_in_place_of_what_was_copied(change: str, strides: str, ran: list[int]) -> None:
    call = Call(strides=strides, wants="qkv")

    def run() -> list[Any]:
        tensors = given(call)
        out = attention(**tensors)
        if change != "nothing":
            with torch.no_grad():
                tensors[change].mul_(2)
        return slopes(out, tensors)

    same_by_a_plan(run, ran)


def reentrant(*tensors: Tensor | None, **options: Any) -> Tensor:
    names = "q", "k", "v", "gate_fine", "gate_coarse"
    return attention(**dict(zip(names, tensors, strict=True)), **options)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        ALL,
        Call(wants="qkv", text=(5, 66)),
        ALL._replace(text=(5, 66), valid="some"),
        ALL._replace(given="contiguous"),
        ALL._replace(given="contiguous", text=(0, 3)),
        *(
            ALL._replace(strides=strides)
            for strides in ("odd address", "axes exchanged", "tokens of 136 bytes")
        ),
    ],
)
def test_checkpointed_layers_run_by_plans(use_reentrant: bool, call: Call, ran: list[int]) -> None:
    def run() -> list[Any]:
        tensors = given(call)
        options = {"grid": call.extent, "text_valid": call.mask()}
        options["selection"] = call.selection(tensors["q"], tensors["k"])
        if call.given:
            options["topk"] = None
        attend = partial(reentrant, **options)
        out = checkpoint(attend, *tensors.values(), use_reentrant=use_reentrant)
        wanting = [x for x in tensors.values() if x is not None]
        out.float().square().sum().backward()
        return [out, *(x.grad for x in wanting)]

    expected = unplanned(run)
    assert isinstance(expected, list)
    assert outcome(run) == outcome(run) == expected
    ran.clear()
    assert outcome(run) == expected
    assert len(ran) == 2


def changed_in_place(out: Tensor, tensors: dict[str, Any], name: str) -> list[Any]:
    with torch.no_grad():
        (out if name == "out" else tensors[name]).mul_(2)
    return slopes(out, tensors)


@pytest.mark.parametrize(
    "run",
    [
        first_derivative,
        second_derivative,
        partial(two_backwards, keep=True),
        partial(two_backwards, keep=False),
        many_gradients,
        under_autocast,
        *(partial(changed_in_place, name=name) for name in ("q", "v", "gate_coarse", "out")),
    ],
)
def test_ways_to_go_backward(run: Callable[..., Any], ran: list[int]) -> None:
    same_by_a_plan(twice(run), ran)


def test_the_second_derivative_is_one_sentence() -> None:
    ALL.run()
    with pytest.raises(NotImplementedError, match=r"^vsa.attention has first derivatives only"):
        twice(second_derivative)()


def test_a_backward_under_autocast_is_that_without() -> None:
    assert outcome(twice(under_autocast)) == outcome(twice(slopes))


@pytest.mark.parametrize("made_in_inference", ["q", "v", "gate_fine"])
def test_tensors_of_inference_mode_in_training(made_in_inference: str, ran: list[int]) -> None:
    def run() -> list[Any]:
        tensors = given()
        with torch.inference_mode():
            tensors[made_in_inference] = tensors[made_in_inference].clone()
        return slopes(attention(**tensors), tensors)

    attention(**given() | {made_in_inference: given()[made_in_inference].detach()})
    same_by_a_plan(run, ran)


def test_modes_of_autograd_around_one_kind(ran: list[int]) -> None:
    def run() -> list[Any]:
        tensors = given()
        with torch.no_grad():
            found = [attention(**tensors)]
            with torch.enable_grad():
                found += slopes(attention(**tensors), tensors)
        with torch.inference_mode():
            return [*found, attention(**tensors)]

    same_by_a_plan(run, ran)
