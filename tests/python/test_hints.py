# SPDX-License-Identifier: Apache-2.0
"""What is allowed and may not be meant is said once; what nobody can mean is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import vsa
from vsa.values import hints


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    hints._said.clear()
    yield
    hints._said.clear()


def said(call) -> list[str]:
    """What is warned about by two calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(each.message) for each in caught if each.category is UserWarning]


def video(*grid: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 1, *grid, 1, 8).unbind())


def flat(tokens: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 1, tokens, 1, 8).unbind())


def test_more_tiles_than_there_are_is_dense_and_said_once() -> None:
    q, k, v = video(4, 8, 8)
    (sentence,) = said(lambda: vsa.attention(q, k, v, 5))
    assert sentence.startswith("topk is 5, but there are 4 key tiles: all of them are kept")
    hints._said.clear()
    assert (
        said(lambda: vsa.attention(q, k, v, 4)) == said(lambda: vsa.attention(q, k, v, 1.0)) == []
    )
    one, other = torch.randn(2, 1, 4, 8, 8, 2, 8).unbind()
    (sentence,) = said(lambda: vsa.select(one, other, (2, 9)))
    assert sentence.startswith("topk is 9, but there are 4 key tiles")


def test_a_one_among_many_tiles_is_asked_about() -> None:
    (sentence,) = said(lambda: vsa.attention(*video(4, 32, 32), 1))
    assert "keeps one key tile of 64" in sentence and "1.0 keeps all of them" in sentence
    hints._said.clear()
    assert said(lambda: vsa.attention(*video(4, 32, 28), 1)) == []  # 56 tiles
    assert said(lambda: vsa.attention(*video(4, 32, 32), 1.0)) == []
    assert said(lambda: vsa.attention(*video(4, 32, 32), 0.016)) == []
    assert vsa.select(*video(4, 32, 32)[:2], 0.016).density == pytest.approx(2 / 64)


def test_runs_of_a_flat_sequence_are_named_unless_they_are_meant() -> None:
    q, k, v = flat(200)
    (sentence,) = said(lambda: vsa.attention(q, k, v, 2))
    assert "q is flat with 200 tokens and no grid was given" in sentence
    hints._said.clear()
    assert said(lambda: vsa.attention(q, k, v, 2, tile=(1, 1, 64))) == []
    assert said(lambda: vsa.attention(q, k, v, 2, grid=(2, 10, 10))) == []
    assert said(lambda: vsa.attention(*flat(64), 1)) == []  # one tile, however it is cut
    selection = vsa.select(q, k, 2, tile=(1, 1, 64))
    assert said(lambda: vsa.block_sparse_attention(q, k, v, selection)) == []
    kept = vsa.attention(q, k, v, 2, tile=(1, 1, 64))
    torch.testing.assert_close(kept, vsa.attention(q, k, v, 2))  # it is the same either way


def test_a_layer_is_made_in_silence() -> None:
    assert said(lambda: vsa.nn.VideoSparseAttention(16, 2, topk=32)) == []


def test_compiled_code_neither_warns_nor_breaks() -> None:
    compiled = torch.compile(
        lambda q, k, v: vsa.attention(q, k, v, 9), fullgraph=True, backend="eager"
    )
    q, k, v = flat(200)
    assert said(lambda: compiled(q, k, v)) == []
    torch.testing.assert_close(compiled(q, k, v), vsa.attention(q, k, v, 1.0))


def test_heads_before_tokens_are_refused() -> None:
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 1, 300, 2, 8).unbind())
    with pytest.raises(ValueError, match=r"^q must be \(B, S, heads, head_dim\), but its shape"):
        vsa.attention(q, k, v, 1)
    wide = torch.randn(3, 1, 300, 256, 2).unbind()  # as many heads, and more tokens
    assert vsa.attention(*wide, 1.0).shape == (1, 300, 256, 2)
