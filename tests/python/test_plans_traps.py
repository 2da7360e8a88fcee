# SPDX-License-Identifier: Apache-2.0
"""What surrounds a remembered call: autograd's hooks, modes, threads, compilers, programs."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from kernels.machines import machine_of
from python.planned_calls import (
    ALL,
    BASE,
    FLAT,
    VIDEO,
    Call,
    attention,
    given,
    outcome,
    same_by_a_plan,
    slopes,
    unplanned,
    without_plans,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vsa.measure import stage_hooks
from vsa.stages import eager


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return without_plans(monkeypatch)


def test_autocast_to_another_type_and_back(ran: list[int]) -> None:
    def run() -> list[Any]:
        tensors = given()
        found = []
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                found.append(attention(**tensors))
                with torch.autocast("cpu", enabled=False):
                    found.append(attention(**tensors))
        return found

    same_by_a_plan(run, ran)
    assert len(ran) == 6


def test_a_subclass_sees_the_operators(ran: list[int]) -> None:
    class Tagged(torch.Tensor):
        pass

    tensors = given()
    plain = attention(**tensors)
    tagged = tensors | {"q": tensors["q"].as_subclass(Tagged)}
    for _ in range(2):
        found = attention(**tagged)
        assert type(found) is Tagged and torch.equal(found, plain)
    assert not ran


class Watcher(TorchFunctionMode):
    """Collects the names of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += [str(function)] * str(function).startswith("vsa.")
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operators(ran: list[int]) -> None:
    tensors = given()
    attention(**tensors)
    with Watcher() as functions:
        attention(**tensors)
    assert len(functions.seen) == 3
    with FlopCounterMode(display=False) as whole:
        attention(**tensors).sum().backward()
    assert not ran
    out = attention(**tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert 0 < backward.get_total_flops() < whole.get_total_flops()
    out, stages = attention(**tensors), []

    @contextlib.contextmanager
    def note(stage: str) -> Any:
        stages.append(stage)
        yield

    with stage_hooks.named(note):
        out.sum().backward()
    assert stages == [stage_hooks.FINE_BACKWARD]
    assert len(ran) == 2


def test_a_default_device_does_not_cost_the_plan(ran: list[int]) -> None:
    tensors = given(BASE)
    expected = attention(**tensors)
    with torch.device("meta"):
        found = attention(**tensors)
    assert len(ran) == 1
    assert torch.equal(found, expected)


def test_compiled_before_and_after(ran: list[int]) -> None:
    def run() -> list[Any]:
        tensors = given()
        compiled = torch.compile(lambda **x: attention(**x), backend="aot_eager", fullgraph=True)
        first = slopes(compiled(**tensors), tensors)
        eager_out, again = attention(**tensors), compiled(**tensors)
        return [*first, *slopes(eager_out, tensors), *slopes(again, tensors)]

    same_by_a_plan(run, ran)


def test_a_backward_that_is_compiled(ran: list[int]) -> None:
    from torch._dynamo import compiled_autograd

    def run() -> list[Any]:
        tensors = given()
        out = attention(**tensors)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            out.sum().backward()
        return [x.grad for x in tensors.values()]

    same_by_a_plan(run, ran)


def test_threads_with_kinds_of_their_own(ran: list[int]) -> None:
    calls = [Call(shape, scale=scale, wants="q") for shape in (VIDEO, FLAT) for scale in (0.2, 0.3)]
    expected = [unplanned(call.run) for call in calls]
    found: list[list[Any]] = [[] for _ in calls]
    # Tensors are made one thread at a time: the seed is the process's.
    tensors = [given(call) for call in calls]

    def work(index: int) -> None:
        for _ in range(4):
            options = {"grid": (4, 5, 6)} if calls[index].shape == FLAT else {}
            out = attention(**tensors[index], scale=calls[index].scale, **options)
            found[index].append(outcome(partial(slopes, out, tensors[index], upstreams[index])))

    upstreams = [
        torch.linspace(-1, 1, x["q"].numel()).view(x["q"].shape).bfloat16() for x in tensors
    ]
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for whole, of_thread in zip(expected, found, strict=True):
        out, _, _, grad = whole
        assert of_thread == [[out, grad]] * 4
    assert len(ran) >= 3 * len(calls)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_a_thread_remembers(ran: list[int]) -> None:
    BASE.run()
    with eager._plans._lock:
        child = os.fork()
        if child == 0:  # a lock that nobody will release would stop it here
            import signal

            signal.alarm(20)
            Call(scale=0.7).run()
            os._exit(0 if len(eager._plans.values) == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_plans_hold_no_tensors(ran: list[int]) -> None:
    for call in (BASE, ALL):
        for _ in range(2):
            tensors = given(call)
            out = attention(**tensors)
            if out.requires_grad:
                out.sum().backward()
            seen = [weakref.ref(x) for x in (*tensors.values(), out) if x is not None]
            del tensors, out
            gc.collect()
            assert [each() for each in seen] == [None] * len(seen)
    assert len(ran) == 2


@pytest.mark.parametrize("call", [ALL, Call(wants="qkv", text=(3, 66), valid="some")])
@pytest.mark.parametrize("pack", [lambda x: x, torch.Tensor.detach], ids=["same", "detached"])
def test_plans_under_hooks_hold_no_output(call: Call, pack: Any, ran: list[int]) -> None:
    for _ in range(2):
        tensors = given(call)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attention(**tensors, grid=call.extent, text_valid=call.mask())
        seen = weakref.ref(out)
        del tensors, out
        gc.collect()
        assert seen() is None
    assert len(ran) == 1


def test_an_error_in_the_middle_leaves_the_plan(
    monkeypatch: pytest.MonkeyPatch, ran: list[int]
) -> None:
    expected = outcome(ALL.run)
    with monkeypatch.context() as patch:
        patch.setattr(
            machine_of("cpu"), "run_program", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            ALL.run()
    assert outcome(ALL.run) == expected and len(ran) == 2
