# SPDX-License-Identifier: Apache-2.0
"""What a ``vsa.KVCache`` costs: launches, memory, graphs; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from python.no_work import NoWork, is_named
from python.streamed import KINDS, Stream, steps, with_gates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vsa
from vsa.backends import named

DOUBLE = 1e-12
READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"}
"""Operators whose result the host has to wait for."""


class Operators(TorchDispatchMode):
    """What is launched: operators, with all that a launch depends on but for numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def told(x: Any) -> str:
            if isinstance(x, Tensor):
                return f"{tuple(x.shape)} {x.stride()} {x.storage_offset()} {x.dtype}"
            if isinstance(x, (list, tuple)):
                return f"[{', '.join(map(told, x))}]"
            return repr(x)

        if not func.is_view:
            self.seen.append((func.name(), told([*args, *(kwargs or {}).items()])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", KINDS)
def test_a_full_ring_launches_the_same_at_every_turn(options: dict[str, Any]) -> None:
    """So that one CUDA graph serves all of them, and nothing waits for the device."""
    stream = Stream()
    cache, launched = stream.cache(), []
    for index, (_, q, current) in enumerate(steps(stream, 7, of_each=1)):
        gated = with_gates(options, q)
        with Operators() as operators:
            vsa.attention(q, *current, 3, cache=cache, **gated)
        launched.append(operators.seen)
        with Operators() as advancing:
            cache.advance()
        is_full = index + 1 >= stream.capacity
        assert [name for name, _ in advancing.seen] == ["aten::copy_"] * is_full
    names = {name.replace("::", ".") for seen in launched for name, _ in seen}
    assert launched[2] and not names & READS
    assert all(seen == launched[2] for seen in launched[3:])
    assert launched[1] != launched[2], "the position would be seen"


def test_a_captured_step_serves_every_turn(machine: tuple[str, str]) -> None:
    if machine[1] == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    stream = Stream(head_dim=64, dtype=torch.bfloat16, device="cuda")
    cache, graph, q_in, pair_in = stream.cache(), None, stream.queries(), stream.pair()
    out = torch.empty_like(q_in)
    side = torch.cuda.Stream()
    for _, q, current in steps(stream, 8, of_each=1):
        wanted = stream.plain(q, current, 3, backend="hopper")
        q_in.copy_(q)
        for to, x in zip(pair_in, current, strict=True):
            to.copy_(x)
        if cache.chunks + 1 == stream.capacity and graph is None:
            vsa.attention(q_in, *pair_in, 3, cache=cache, backend="hopper")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                out = vsa.attention(q_in, *pair_in, 3, cache=cache, backend="hopper")
        if graph is None:
            out = vsa.attention(q_in, *pair_in, 3, cache=cache, backend="hopper")
        else:
            graph.replay()
        torch.testing.assert_close(out, wanted, rtol=2**-6, atol=2**-6)
        cache.advance()


def test_means_are_of_the_current_chunk_and_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, tokens = Stream(), []
    backend = named("torch")
    means_of = backend.tile_means

    def tile_means(xs: Sequence[Tensor], grids: Sequence[vsa.Grid]) -> list[Tensor]:
        tokens.extend(x.shape[1] for x in xs)
        return means_of(xs, grids)

    monkeypatch.setattr(backend, "tile_means", tile_means)
    cache = stream.cache()
    nbytes, at = cache.nbytes, cache._tokens.data_ptr()
    for _, q, current in steps(stream, 6, of_each=1):
        vsa.attention(q, *current, 3, cache=cache, backend="torch", gate_coarse=q)
        before = cache._tokens.clone(), cache._means.clone()
        cache.advance()
        assert torch.equal(cache._tokens, before[0]) and torch.equal(cache._means, before[1])
    assert set(tokens) == {30}
    assert (cache.nbytes, cache._tokens.data_ptr()) == (nbytes, at)
    held = 2 * 2 * 3 * 30 * 1 * 16 * 8
    assert held < nbytes < 2 * held


def test_another_video_after_reset() -> None:
    stream = Stream(prefix=2)
    cache = stream.cache()
    outs = []
    for _ in range(2):
        torch.default_generator.manual_seed(1)
        stream.past.clear()
        cache.write_text(*stream.keys_of_text())
        for _, q, current in steps(stream, 5, of_each=1):
            outs.append(vsa.attention(q, *current, 3, cache=cache))
            cache.advance()
        cache.reset()
        assert cache.chunks == 0
        with pytest.raises(ValueError, match="prefix of 2 text tokens that nobody has written"):
            vsa.attention(q, *current, 3, cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(outs[:5], outs[5:], strict=True))


def test_inference_mode_comes_and_goes() -> None:
    stream = Stream()
    with torch.inference_mode():
        cache = stream.cache()
    for index, (_, q, current) in enumerate(steps(stream, 5, of_each=1)):
        with torch.inference_mode(index % 2 == 0):
            out = vsa.attention(q, *current, 3, cache=cache)
            cache.advance()
        torch.testing.assert_close(out, stream.plain(q, current, 3), rtol=0, atol=DOUBLE)


def test_one_compiled_graph_of_a_full_ring() -> None:
    stream, compiled = Stream(), []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(module)
        return module

    cache = stream.cache()
    attend = torch.compile(
        lambda q, k, v: vsa.attention(q, k, v, 3, cache=cache, gate_coarse=q),
        backend=backend,
        fullgraph=True,
        dynamic=False,
    )
    counts = []
    for _, q, current in steps(stream, 7, of_each=1):
        out = attend(q, *current)
        wanted = stream.plain(q, current, 3, gate_coarse=q)
        torch.testing.assert_close(out, wanted, rtol=0, atol=DOUBLE)
        cache.advance()
        counts.append(len(compiled))
    assert counts[2:] == [3] * 5, counts


CHUNK = (2, 3, 5)
Q, K = torch.randn(1, *CHUNK, 2, 16), torch.randn(1, *CHUNK, 1, 16)
WANTS = K.clone().requires_grad_()
MAKE = partial(vsa.KVCache, 1, 1, 16, CHUNK, 3, sinks=1, tile=(2, 2, 3), dtype=torch.float32)
FULL = vsa.KVCache(1, 1, 16, CHUNK, 2, sinks=2, tile=(2, 2, 3), dtype=torch.float32)
for _ in range(2):
    vsa.attention(Q, K, K, 1, cache=FULL)
    FULL.advance()


def attend(q: Any = Q, k: Any = K, v: Any = K, topk: Any = 1, **options: Any) -> object:
    return vsa.attention(q, k, v, topk, **{"cache": MAKE()} | options)


REFUSED: list[tuple[str, type[Exception], Callable[[vsa.KVCache], object]]] = [
    ("cache", TypeError, lambda cache: attend(cache="all")),
    ("q", ValueError, lambda cache: attend(q=Q.clone().requires_grad_(), cache=cache)),
    ("k", ValueError, lambda cache: attend(k=WANTS, cache=cache)),
    ("v", ValueError, lambda cache: attend(v=WANTS, cache=cache)),
    ("gate_coarse", ValueError, lambda cache: attend(gate_coarse=WANTS, cache=cache)),
    ("gate_fine", ValueError, lambda cache: attend(gate_fine=torch.ones(3), cache=cache)),
    ("q", TypeError, lambda cache: attend(Q.bfloat16(), K.bfloat16(), K.bfloat16(), cache=cache)),
    ("k", TypeError, lambda cache: attend(k=K.bfloat16(), cache=cache)),
    ("q", ValueError, lambda cache: attend(*[x[:, :1] for x in (Q, K, K)], cache=cache)),
    ("grid", ValueError, lambda cache: attend(grid=(2, 5, 3), cache=cache)),
    ("grid", ValueError, lambda cache: attend(grid=vsa.Grid(CHUNK), cache=cache)),
    ("kv_grid", ValueError, lambda cache: attend(kv_grid=(4, 3, 5), cache=cache)),
    ("tile", ValueError, lambda cache: attend(tile=(1, 3, 5), cache=cache)),
    ("mask", ValueError, lambda cache: attend(mask=vsa.masks.ChunkCausal(2), cache=cache)),
    ("k", ValueError, lambda cache: attend(*[torch.cat((x, x)) for x in (Q, K, K)], cache=cache)),
    ("k", ValueError, lambda cache: attend(k=Q, v=Q, cache=cache)),
    ("k", ValueError, lambda cache: attend(*[x[..., :8] for x in (Q, K, K)], cache=cache)),
    ("k", ValueError, lambda cache: attend(k=LONG, v=LONG, cache=cache)),
    ("topk", ValueError, lambda cache: attend(topk=0, cache=cache)),
    ("topk", TypeError, lambda cache: attend(topk=None, cache=cache)),
    ("score", TypeError, lambda cache: attend(score=3, cache=cache)),
    ("selection", TypeError, lambda cache: attend(selection="all", cache=cache)),
    ("selection", ValueError, lambda cache: attend(selection=OTHER, cache=cache)),
    ("text_valid", ValueError, lambda cache: attend(text_valid=VALID, cache=cache)),
    ("backend", RuntimeError, lambda cache: attend(backend="emulated", cache=cache)),
    ("cache", ValueError, lambda cache: attend(cache=FULL)),
    ("cache", ValueError, lambda cache: MAKE().advance()),
    ("prefix", ValueError, lambda cache: cache.write_text(K, K)),
    ("k", ValueError, lambda cache: MAKE(prefix=2).write_text(K[:, 0, 0, :3], K[:, 0, 0, :3])),
    ("k", TypeError, lambda cache: MAKE(prefix=2).write_text(None, K)),
    ("v", ValueError, lambda cache: MAKE(prefix=2).write_text(K[:, 0, 0, :2], WANTS[:, 0, 0, :2])),
]  # fmt: skip
LONG = torch.cat((K, K), dim=1)
VALID = torch.ones(1, 2, dtype=torch.bool)
OTHER = vsa.Selection.from_mask(torch.ones(1, 2, 4, 4).bool())


@pytest.mark.parametrize("wrong", REFUSED, ids=[f"{i}-{x[0]}" for i, x in enumerate(REFUSED)])
def test_what_does_not_fit_changes_nothing(
    wrong: tuple[str, type[Exception], Callable[[vsa.KVCache], object]],
) -> None:
    name, kind, call = wrong
    cache = MAKE()
    attend(cache=cache)
    cache.advance()
    before = str(cache), cache._tokens.clone(), cache._means.clone(), cache._now.clone()
    with pytest.raises(kind) as caught:
        call(cache)
    sentence = str(caught.value)
    assert is_named(name, sentence), sentence
    assert len(sentence.split()) >= 5 and "\n" not in sentence
    assert str(cache) == before[0]
    after = cache._tokens, cache._means, cache._now
    assert all(torch.equal(a, b) for a, b in zip(after, before[1:], strict=True))


def test_a_refused_call_does_no_work() -> None:
    cache = MAKE()
    with pytest.raises(ValueError, match="k must have"), NoWork():
        vsa.attention(Q, Q, Q, 1, cache=cache)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("batch", ValueError, {"batch": 0}),
        ("kv_heads", TypeError, {"kv_heads": "all"}),
        ("head_dim", ValueError, {"head_dim": 0}),
        ("chunk", TypeError, {"chunk": 3}),
        ("capacity", ValueError, {"capacity": 0}),
        ("sinks", ValueError, {"sinks": -1}),
        ("sinks", ValueError, {"sinks": 4}),
        ("prefix", TypeError, {"prefix": 1.5}),
        ("tile", ValueError, {"tile": (4, 4, 4)}),
        ("tile", ValueError, {"tile": "best"}),
        ("dtype", TypeError, {"dtype": torch.int8}),
    ],
)
def test_a_cache_that_cannot_be(name: str, kind: type[Exception], options: dict[str, Any]) -> None:
    usual = {"batch": 1, "kv_heads": 1, "head_dim": 16, "chunk": CHUNK, "capacity": 3}
    with pytest.raises(kind) as caught:
        vsa.KVCache(**usual | options)
    assert is_named(name, str(caught.value)), str(caught.value)


def test_a_tile_that_straddles_is_told_one_that_does_not() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) straddles .* \(3, 5, 4\) does not"):
        vsa.KVCache(1, 12, 128, (3, 30, 52), 7, tile=(4, 4, 4))
    assert vsa.KVCache(1, 1, 16, (3, 30, 52), 2).tile == (3, 5, 4)
