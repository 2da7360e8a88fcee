# SPDX-License-Identifier: Apache-2.0
"""Prepared calls with a cache: what they give is what the stages give, and no plan is stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels.machines import backend_on
from python.planned_calls import without_plans
from python.streamed import Stream, steps, with_gates
from torch import Tensor

import vsa
from vsa.stages import eager

COARSE = {"gate_coarse": True}
KINDS: list[tuple[str, Any, dict[str, Any]]] = [
    ("plain", 3, {}),
    ("share", 0.4, COARSE),
    ("budgets-of-heads", (2, 0.5), COARSE),
    ("mass", vsa.TopP(0.6, floor=2), COARSE),
    ("everything", 1.0, COARSE),
    ("gates", 3, {"gate_coarse": True, "gate_fine": True}),
    ("fine-gate", 3, {"gate_fine": True}),
    ("choice", 3, {"return_selection": True, **COARSE}),
    ("lse", 3, {"return_lse": True}),
    ("both", 3, {"return_lse": True, "return_selection": True}),
    ("tail", 3, {"tail": True}),
    ("tail-coarse", 3, {"tail": True, **COARSE}),
    ("scale", 3, {"scale": 0.25}),
    ("int8", 3, {"precision": "int8", **COARSE}),
    ("fp8", 3, {"precision": "fp8"}),
]
CALLS = pytest.mark.parametrize(
    ("topk", "options"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS]
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call that a plan runs."""
    return without_plans(monkeypatch)


def stream_of(device: str = "cpu", **settings: Any) -> Stream:
    """Chunks of 30 tokens in 4 ragged tiles, for our kernels."""
    chosen = {"head_dim": 64, "dtype": torch.bfloat16, "device": device} | settings
    return Stream(**chosen)


def parts(found: Any) -> list[Tensor]:
    """The tensors that a call returns."""
    found = found if isinstance(found, tuple) else (found,)
    return [getattr(x, "bitmap", x) for x in found]


def same(found: Any, wanted: Any) -> None:
    """Choices are equal, and numbers but for the order of their sums."""
    for x, y in zip(parts(found), parts(wanted), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if x.dtype == torch.int32:
            assert torch.equal(x, y), "the choice"
        else:
            torch.testing.assert_close(x.float(), y.float(), rtol=2**-6, atol=2**-6)


def held(cache: vsa.KVCache) -> list[Tensor]:
    return [x.clone() for x in cache.memory]


def both(cache: vsa.KVCache, *args: Any, **options: Any) -> tuple[Any, Any]:
    """A call by a plan, if there is one, and by the stages; both leave the same in the cache."""
    found = vsa.attention(*args, cache=cache, **options)
    after, state = held(cache), repr(cache)
    with eager.paused():
        wanted = vsa.attention(*args, cache=cache, **options)
    assert all(torch.equal(x, y) for x, y in zip(after, cache.memory, strict=True))
    assert repr(cache) == state
    return found, wanted


@CALLS
def test_every_step_is_that_of_the_stages(
    topk: Any, options: dict[str, Any], machine: tuple[str, str], ran: list[int]
) -> None:
    backend, device = machine
    stream = stream_of(device)
    cache, planned = stream.cache(), []
    for is_last, q, current in steps(stream, 6):
        ran.clear()
        gated = with_gates(options, q)
        same(*both(cache, q, *current, topk, backend=backend, **gated))
        planned.append(len(ran))
        if is_last:
            cache.advance()
    filling = [0, 0, 0, 0] if "tail" in options else [0, 1, 0, 1]
    assert planned == [*filling, 0, 1, *[1] * 6], "plans of a chunk's second step, and of a turn"


@pytest.mark.parametrize("settings", [
    {"sinks": 0},
    {"capacity": 1, "sinks": 0},
    {"capacity": 2, "sinks": 2},
    {"capacity": 5, "sinks": 2, "batch": 1},
    {"head_dim": 128, "dtype": torch.float16},
    {"heads": 4, "kv_heads": 2},
    {"chunk": (3, 4, 5), "tile": (3, 4, 5)},
    {"chunk": (1, 9, 8), "tile": (1, 2, 2)},
], ids=str)  # fmt: skip
def test_any_cache(settings: dict[str, Any], ran: list[int]) -> None:
    stream = stream_of(**settings)
    cache = stream.cache()
    chunks = stream.capacity if stream.sinks == stream.capacity else stream.capacity + 4
    for is_last, q, current in steps(stream, chunks):
        asked = {"gate_coarse": q, "return_selection": True}
        same(*both(cache, q, *current, 0.4, backend="emulated", **asked))
        if is_last:
            cache.advance()
    assert len(ran) >= chunks


@pytest.mark.parametrize("comes_along", [False, True], ids=["stays", "comes-along"])
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_text(comes_along: bool, precision: str, ran: list[int]) -> None:
    stream = stream_of(prefix=70)
    cache = stream.cache()
    valid = torch.arange(2 * 70).view(2, 70) % 3 > 0
    if not comes_along:
        cache.write_text(*stream.keys_of_text())
    for is_last, q, current in steps(stream, 5):
        more: dict[str, Any] = {"precision": precision, "gate_coarse": q}
        rows, keys = q, current
        if comes_along:
            texts = stream._random(70, 2), *stream.keys_of_text()
            rows, *keys = (
                torch.cat((text, x.flatten(1, 3)), 1)
                for text, x in zip(texts, (q, *current), strict=True)
            )
            more |= {"text_valid": valid, "gate_coarse": rows}
        same(*both(cache, rows, *keys, 0.4, backend="emulated", **more))
        if is_last:
            cache.advance()
    assert len(ran) == 7 - comes_along  # the first one finds a cache without text
    cache.reset()
    if not comes_along:
        with pytest.raises(ValueError, match="70 text tokens that nobody has written"):
            vsa.attention(q, *current, 0.4, cache=cache, backend="emulated", **more)


@pytest.mark.parametrize("strides", ["heads outside", "part", "odd address"])
def test_keys_that_lie_anywhere(strides: str, ran: list[int]) -> None:
    def laid(x: Tensor) -> Tensor:
        if strides == "heads outside":
            return x.movedim(-2, 1).contiguous().movedim(1, -2)
        if strides == "part":
            return torch.cat((x, x), -2)[..., : x.shape[-2], :]
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    stream = stream_of()
    cache = stream.cache()
    for is_last, q, current in steps(stream, 5):
        tensors = [laid(x) for x in (q, *current)]
        same(*both(cache, *tensors, 3, backend="emulated", gate_coarse=q))
        if is_last:
            cache.advance()
    assert len(ran) == 7


@pytest.mark.parametrize("coarse", [False, True])
def test_a_choice_that_is_reused(coarse: bool, ran: list[int]) -> None:
    stream = stream_of()
    cache, selection = stream.cache(), None
    for is_last, q, current in steps(stream, 6, of_each=3):
        given: dict[str, Any] = {"gate_coarse": q} if coarse else {}
        given |= {"backend": "emulated"}
        if selection is None:
            _, selection = vsa.attention(
                q, *current, 3, cache=cache, return_selection=True, **given
            )
        else:
            same(*both(cache, q, *current, None, selection=selection, **given))
        if is_last:
            cache.advance()
            selection = None
    assert len(ran) == 2 + 1 + 3 * 3


@pytest.mark.parametrize("topk", [3, 7, vsa.TopP(0.3, floor=3)], ids=str)
@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_equal_scores_go_to_the_oldest(
    topk: Any, sinks: int, machine: tuple[str, str], ran: list[int]
) -> None:
    """All chunks have the same keys, so that the order of tiles alone decides between them."""
    backend, device = machine
    stream = stream_of(device, capacity=4, sinks=sinks, chunk=(2, 6, 9), tile=(2, 2, 3))
    cache, (k, _) = stream.cache(), stream.pair()
    turned = False
    for is_last, q, (_, v) in steps(stream, 9):
        asked = {"return_selection": True, "backend": backend}
        _, found = vsa.attention(q, k, v, topk, cache=cache, **asked)
        stream.past = [(k, each) for _, each in stream.past]
        _, wanted = stream.plain(q, (k, v), topk, **asked)
        assert torch.equal(found.bitmap, wanted.bitmap)
        turned = turned or not torch.equal(found.bitmap, cache.in_slots(found).bitmap)
        if is_last:
            cache.advance()
    assert turned, "the ring has turned, and slots are in another order than time"
    assert len(ran) >= 10


def test_a_step_is_one_program(monkeypatch: pytest.MonkeyPatch, ran: list[int]) -> None:
    machine, programs = backend_on("cpu").machine, []
    run_program = type(machine).run_program

    def counting(self: Any, *args: Any) -> None:
        programs.append(1)
        run_program(self, *args)

    def unexpected(self: Any, *args: Any) -> None:
        raise AssertionError("a kernel was launched from Python")

    stream = stream_of()
    cache, options = stream.cache(), {"backend": "emulated"}
    for index, (_, q, current) in enumerate(steps(stream, 6, of_each=1)):
        if index == stream.capacity:
            monkeypatch.setattr(type(machine), "run_program", counting)
            monkeypatch.setattr(type(machine), "run", unexpected)
        vsa.attention(q, *current, 3, cache=cache, gate_coarse=q, **options)
        cache.advance()
    assert len(programs) == len(ran) == 3


def tensors(stream: Stream) -> Iterator[Tensor]:
    yield stream.queries()
    yield from stream.pair()


def test_what_is_refused_after_a_plan_changes_nothing(ran: list[int]) -> None:
    stream = stream_of(capacity=2, sinks=2)
    cache, options = stream.cache(), {"backend": "emulated"}
    for _ in range(2):
        for _ in range(2):
            q, k, v = tensors(stream)
            vsa.attention(q, k, v, 3, cache=cache, **options)
        before, state = held(cache), repr(cache)
        wrong: list[tuple[Any, dict[str, Any]]] = [
            ("k requires a gradient", {"k": k.clone().requires_grad_()}),
            ("k must share the dtype", {"k": k.float()}),
            ("topk must be", {"topk": 0}),
            ("v must have", {"v": v[:1]}),
            ("tile must be", {"tile": (1, 3, 3)}),
            ("precision must be", {"precision": "half"}),
        ]
        for sentence, change in wrong:
            given = {"q": q, "k": k, "v": v, "topk": 3} | change
            with pytest.raises((ValueError, TypeError), match=sentence):
                vsa.attention(**given, cache=cache, **options)
        assert repr(cache) == state
        assert all(torch.equal(x, y) for x, y in zip(before, cache.memory, strict=True))
        cache.advance()
    ran.clear()
    with pytest.raises(ValueError, match="no place for another chunk"):
        vsa.attention(q, k, v, 3, cache=cache, **options)
    assert not ran


def test_caches_that_differ_have_plans_of_their_own(ran: list[int]) -> None:
    """All take the same chunks; each step of each is that of the stages."""
    streams = [
        stream_of(capacity=capacity, sinks=sinks, prefix=prefix)
        for capacity, sinks, prefix in ((3, 0, 0), (3, 1, 0), (3, 3, 0), (4, 1, 0), (3, 1, 2))
    ]
    caches = [stream.cache() for stream in streams]
    for cache in caches:
        if cache.prefix:
            cache.write_text(*streams[-1].keys_of_text())
    for is_last, q, current in steps(streams[0], 7):
        for cache in caches:
            if cache.past < cache.capacity:
                same(*both(cache, q, *current, 3, backend="emulated", return_selection=True))
                if is_last:
                    cache.advance()
    assert len(ran) > 30
