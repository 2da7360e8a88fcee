# SPDX-License-Identifier: Apache-2.0
"""``vsa.KVCache``: attention over it is attention over concatenated keys, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from python.streamed import KINDS, Stream, steps, with_gates

import vsa

DOUBLE = 1e-12
BUDGETS = [0.4, (2, 0.5), vsa.TopP(0.6, floor=2), 1.0]


def same(stream: Stream, chunks: int, topk: Any, most: float = DOUBLE, **options: Any) -> None:
    """Every step of a stream through a cache is that over concatenated keys."""
    cache = stream.cache()
    called = {"backend": options.pop("backend", "auto"), "return_selection": True}
    for is_last, q, current in steps(stream, chunks):
        gated = with_gates(options, q)
        found = vsa.attention(q, *current, topk, cache=cache, return_lse=True, **gated, **called)
        wanted = stream.plain(q, current, topk, return_lse=True, **gated, **called)
        held = len(stream.held(current))
        assert cache.chunks == held
        assert torch.equal(found[1].bitmap, wanted[1].bitmap), "the choice"
        assert found[1].kv_grid == wanted[1].kv_grid and found[1].most == wanted[1].most
        for each, truth in ((found[0], wanted[0].view(q.shape)), (found[2], wanted[2])):
            assert each.dtype == truth.dtype and each.shape == truth.shape
            assert (each - truth).abs().max() <= most
        if is_last:
            cache.advance()


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("topk", BUDGETS, ids=str)
def test_a_cache_is_concatenated_keys(topk: Any, options: dict[str, Any]) -> None:
    same(Stream(), 6, topk, **options)


@pytest.mark.parametrize("options", KINDS)
def test_on_our_kernels(options: dict[str, Any], machine: tuple[str, str]) -> None:
    backend, device = machine
    stream = Stream(head_dim=64, dtype=torch.bfloat16, device=device)
    same(stream, 5, 0.4, most=2**-5, backend=backend, **options)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_on_flex() -> None:
    same(Stream(dtype=torch.float32, batch=1), 5, 0.4, most=1e-5, backend="flex", gate_coarse=True)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_in_eight_bits(precision: str) -> None:
    stream = Stream(head_dim=64, dtype=torch.bfloat16, chunk=(2, 4, 6))
    same(stream, 5, 0.5, most=0.15, precision=precision, backend="torch")


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Any chunk, cut by any tile that does not straddle two, ragged along h and w."""
    unit, kv_heads, capacity = (draw(st.integers(1, most)) for most in (3, 2, 4))
    chunk = unit * draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tile = unit, draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Stream(
        chunk,
        capacity,
        sinks=draw(st.integers(0, capacity - 1)),
        tile=tile,
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        batch=draw(st.integers(1, 2)),
        head_dim=4,
    )


@given(stream=streams(), topk=st.sampled_from([1, 4, 0.3, 0.8]), coarse=st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_chunk_tile_and_capacity(stream: Stream, topk: Any, coarse: bool) -> None:
    same(stream, stream.capacity + 3, topk, **({"gate_coarse": True} if coarse else {}))


@pytest.mark.parametrize("topk", [2, 5, vsa.TopP(0.5)], ids=str)
@pytest.mark.parametrize("score", ["mean", vsa.SubBlocks(2)], ids=str)
def test_equal_scores_go_to_the_oldest(score: Any, topk: Any) -> None:
    """All chunks have the same keys, so that the order of tiles alone decides between them."""
    stream = Stream(dtype=torch.float32)
    cache, (k, _) = stream.cache(), stream.pair()
    turned = False
    for is_last, q, (_, v) in steps(stream, 6, of_each=1):
        _, found = vsa.attention(q, k, v, topk, cache=cache, score=score, return_selection=True)
        stream.past = [(k, each) for _, each in stream.past]
        _, wanted = stream.plain(q, (k, v), topk, score=score, return_selection=True)
        assert torch.equal(found.bitmap, wanted.bitmap)
        turned = turned or not torch.equal(found.bitmap, cache.in_slots(found).bitmap)
        assert is_last
        cache.advance()
    assert turned, "the ring has turned, and slots are in another order than time"


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("topk", [1.0, 3])
def test_generation_is_training_under_its_mask(topk: Any, sinks: int) -> None:
    """Where budgets are whole numbers, a chunk of the whole video under the mask is a step."""
    stream = Stream(sinks=sinks, batch=1)
    frames, window = stream.chunk[0], stream.capacity - sinks
    mask = vsa.masks.ChunkCausal(frames, window=window, sinks=sinks)
    cache, outs, queries = stream.cache(), [], []
    for is_last, q, current in steps(stream, 6):
        out = vsa.attention(q, *current, topk, cache=cache)
        if is_last:
            outs.append(out)
            queries.append(q)
            cache.advance()
    k, v = (torch.cat([pair[side] for pair in stream.past], 1) for side in (0, 1))
    whole = vsa.attention(torch.cat(queries, 1), k, v, topk, tile=stream.tile, mask=mask)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=DOUBLE)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("comes_along", [False, True], ids=["stays", "comes-along"])
def test_text_stays_before_the_video(comes_along: bool, options: dict[str, Any]) -> None:
    stream = Stream(prefix=3)
    cache = stream.cache()
    valid = torch.tensor([[True, False, True], [True, True, False]])
    if not comes_along:
        cache.write_text(*stream.keys_of_text())
    for is_last, q, current in steps(stream, 5):
        rows, keys, more = q, current, {}
        if comes_along:
            text = stream.keys_of_text()
            of_text = stream._random(3, 2)
            rows = torch.cat((of_text, q.flatten(1, 3)), 1)
            each = zip(text, current, strict=True)
            keys = tuple(torch.cat((a, b.flatten(1, 3)), 1) for a, b in each)
            more = {"text_valid": valid}
        gated = with_gates(options, rows)
        out = vsa.attention(rows, *keys, 0.4, cache=cache, **gated, **more)
        wanted = stream.plain(rows, current, 0.4, **gated, **more)
        torch.testing.assert_close(out, wanted.view(out.shape), rtol=0, atol=DOUBLE)
        if is_last:
            cache.advance()


def test_a_choice_is_reused_in_later_steps() -> None:
    stream = Stream()
    cache, selection = stream.cache(), None
    for is_last, q, current in steps(stream, 5, of_each=2):
        options = with_gates({"gate_coarse": True}, q)
        if selection is None:
            _, selection = vsa.attention(
                q, *current, 3, cache=cache, return_selection=True, **options
            )
        else:
            given = {"selection": selection, **options}
            out = vsa.attention(q, *current, None, cache=cache, **given)
            wanted = stream.plain(q, current, None, **given)
            torch.testing.assert_close(out, wanted, rtol=0, atol=DOUBLE)
        if is_last:
            cache.advance()
            selection = None


def test_a_layer_takes_a_cache() -> None:
    mask = vsa.masks.ChunkCausal(2, window=2, sinks=1)
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=3, tile=(2, 2, 3), mask=mask).double()
    torch.nn.init.normal_(layer.to_gate_compress.weight, std=0.1)
    stream = Stream(batch=1)
    cache = stream.cache()
    cache = vsa.KVCache(1, 2, 16, (2, 3, 5), 3, sinks=1, tile=(2, 2, 3), dtype=torch.float64)
    video = torch.randn(1, 10, 3, 5, 32, dtype=torch.float64)
    outs = []
    with torch.no_grad():
        for chunk in video.split(2, dim=1):
            outs.append(layer(chunk, cache=cache))
            cache.advance()
        torch.testing.assert_close(torch.cat(outs, 1), layer(video), rtol=0, atol=DOUBLE)
        with pytest.raises(ValueError, match="tile of the cache must be that of the layer"):
            vsa.nn.VideoSparseAttention(32, 2)(video[:, :2].float(), cache=cache)


def test_teacher_forcing_is_generation_over_clean_chunks() -> None:
    """The noisy half of training sees what a step sees, if clean keys are kept in the end."""
    stream, chunks = Stream(capacity=4, sinks=0, batch=1), 4
    cache, outs = stream.cache(), []
    clean, noisy = ([(stream.queries(), *stream.pair()) for _ in range(chunks)] for _ in "cn")
    for before, after in zip(noisy, clean, strict=True):
        outs.append(vsa.attention(*before, 3, cache=cache))
        vsa.attention(*after, 3, cache=cache)  # overwrites the noisy keys
        cache.advance()
    q, k, v = (torch.cat([each[part] for each in (*clean, *noisy)], 1) for part in range(3))
    mask = vsa.masks.TeacherForcing(stream.chunk[0])
    whole = vsa.attention(q, k, v, 3, tile=stream.tile, mask=mask)
    half = whole.shape[1] // 2
    torch.testing.assert_close(torch.cat(outs, 1), whole[:, half:], rtol=0, atol=DOUBLE)


def test_heads_that_are_spread_over_ranks() -> None:
    """Each rank has a cache of its own heads, and nothing to ask of the others."""
    stream = Stream(heads=4, kv_heads=2)
    whole, ranks = stream.cache(), [Stream(heads=2, kv_heads=1).cache() for _ in range(2)]
    for _, q, (k, v) in steps(stream, 5, of_each=1):
        out = vsa.attention(q, k, v, 3, cache=whole, gate_coarse=q)
        parts = [
            vsa.attention(mine, *keys, 3, cache=cache, gate_coarse=mine)
            for mine, cache, *keys in zip(
                q.chunk(2, -2), ranks, k.chunk(2, -2), v.chunk(2, -2), strict=True
            )
        ]
        torch.testing.assert_close(torch.cat(parts, -2), out, rtol=0, atol=DOUBLE)
        for cache in (whole, *ranks):
            cache.advance()


def test_under_autocast_the_cache_has_its_type() -> None:
    stream = Stream(dtype=torch.bfloat16)
    cache = stream.cache()
    q, (k, v) = stream.queries().float(), (x.float() for x in stream.pair())
    with torch.autocast("cpu", torch.bfloat16):
        out = vsa.attention(q, k, v, 3, cache=cache)
    assert out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="q must have the dtype of the cache"):
        vsa.attention(q, k, v, 3, cache=cache)
