# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences of segments against the definition, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequences.cases import CASES, VIDEO, attend, check, errors_of_sdpa, gradients, truth
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa
from vsa import Segment

ON_KERNELS = [
    "h3",
    "h3, prefix competes",
    "ref2va",
    "128 tokens",
    "256 tokens",
    "budgets of all kinds",
    "dense video, kept video",
    "other keys",
    "one token",
    "invalid text",
    "invalid text, two videos",
    "invalid text that competes",
    "a kept image beside invalid text",
]


@pytest.mark.parametrize("name", CASES)
def test_definition(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ref2va", "h3", "128 tokens", "invalid text, two videos"])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    check(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("name", ["ref2va", "h3", "128 tokens", "invalid text, two videos"])
def test_definition_on_flex(name: str) -> None:
    check(replace(CASES[name], dtype=torch.float32), "flex", wants=False)


@pytest.mark.parametrize("name", ON_KERNELS)
def test_definition_on_kernels(name: str, machine: tuple[str, str]) -> None:
    backend, device = machine
    check(replace(CASES[name], dtype=torch.bfloat16, head_dim=64), backend, device)


@pytest.mark.parametrize("gates", [(), ("gate_coarse",)], ids=str)
def test_text_around_a_video_is_a_grid(gates: tuple[str, ...]) -> None:
    """Choice, output, log-sum-exp and gradients have the same bits as with ``vsa.Grid``."""
    case = replace(CASES["h3"], segments=(7, 5, VIDEO, 9), batch=2, gates=gates, text_valid=True)
    grid = vsa.Grid(VIDEO.shape, VIDEO.tile, prefix=12, suffix=9)
    results = []
    for of in (case.sequence, grid):
        given = {name: x.requires_grad_() for name, x in case.tensors().items()}
        out, chosen, lse = vsa.attention(
            *(given[name] for name in "qkv"),
            case.topk,
            grid=of,
            gate_coarse=given.get("gate_coarse"),
            text_valid=case.valid(),
            return_selection=True,
            return_lse=True,
        )
        found = gradients(case, given, out, lse)
        results.append([out, lse, chosen.bitmap, *found.values()])
        assert torch.equal(
            vsa.select(given["q"], given["k"], case.topk, grid=of).bitmap, results[-1][2]
        )
        fine, fine_lse = vsa.block_sparse_attention(
            *(given[name] for name in "qkv"),
            chosen,
            grid=of,
            text_valid=case.valid(),
            return_lse=True,
        )
        results[-1] += [
            fine,
            fine_lse,
            chosen.recall(given["q"], given["k"], text_valid=case.valid()),
        ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_padded_tiles_give_what_a_grid_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way by padded tiles, taken where it need not be, has the same choice and numbers."""
    from vsa.stages import sequences
    from vsa.stages.sequences import call

    case = replace(CASES["h3"], segments=(70, VIDEO, 9), batch=2)
    results = []
    for by_tiles in (False, True):
        if by_tiles:
            monkeypatch.setattr(call, "_grid_of", lambda sequence: call.OwnGrid(None))
            monkeypatch.setattr(sequences, "as_grids", lambda given: None)
        given = {name: x.requires_grad_() for name, x in case.tensors().items()}
        out, chosen, lse = attend(case, given)
        results.append([out, lse, *gradients(case, given, out, lse).values(), chosen.bitmap])
    assert torch.equal(results[0][-1], results[1][-1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ref2va", "h3", "other keys", "invalid text, two videos"])
def test_a_choice_can_be_used_again(name: str) -> None:
    case = CASES[name]
    given = case.tensors()
    out, chosen, lse = attend(case, given)
    again, same, again_lse = attend(case, given, selection=chosen)
    assert same.shape == chosen.shape
    assert torch.equal(out.nan_to_num(7), again.nan_to_num(7)) and torch.equal(lse, again_lse)
    ungated, _, _ = attend(replace(case, gates=()), {name: given[name] for name in "qkv"})
    fine, fine_lse = vsa.block_sparse_attention(
        *(given[name] for name in "qkv"), chosen, text_valid=case.valid(), return_lse=True
    )
    assert torch.equal(fine.nan_to_num(7), ungated.nan_to_num(7)) and torch.equal(fine_lse, lse)


@pytest.mark.parametrize("name", ["ref2va", "h3", "dense video, kept video", "other keys"])
def test_any_choice(name: str) -> None:
    """One that no score made, with rows that keep nothing."""
    case = replace(CASES[name], gates=())
    shape = case.batch, case.heads, case.sequence.query_tiles, case.kv_sequence.key_tiles
    mask = torch.rand(shape) < 0.4
    mask[0, 0, 0] = False
    given = case.tensors()
    chosen = vsa.Selection.from_mask(mask, case.sequence, case.kv_sequence)
    out, _, lse = attend(case, given, selection=chosen)
    exact, _, exact_lse = truth(case, given, given=mask)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ref2va", "several videos in one competition", "per head"])
def test_select(name: str) -> None:
    case = CASES[name]
    q, k = (case.tensors()[x] for x in "qk")
    _, chosen, _ = attend(case, case.tensors())
    assert torch.equal(vsa.select(q, k, case.topk, grid=case.sequence).bitmap, chosen.bitmap)
    tiles = case.sequence.query_tiles
    for must in ("self", torch.rand(tiles, tiles) < 0.2):
        found = vsa.select(q, k, case.topk, grid=case.sequence, must=must)
        forced = torch.eye(tiles, dtype=torch.bool) if isinstance(must, str) else must
        _, wanted, _ = truth(case, case.tensors(), must=forced)
        assert torch.equal(found.mask(), wanted) and (found.mask() | ~forced).all()


@pytest.mark.parametrize("name", ["ref2va", "h3", "invalid text, two videos", "other keys"])
def test_recall(name: str) -> None:
    """The share of dense attention's mass on what is attended, over queries that choose."""
    case = replace(CASES[name], gates=())
    given = case.tensors()
    _, chosen, lse = attend(case, given)
    everything = torch.ones(chosen.shape, dtype=torch.bool)
    _, _, dense = truth(case, given, given=everything)
    sparse = [at for at, each in enumerate(case.sequence.segments) if each.is_sparse]
    tokens = [range(case.sequence.length)[case.sequence.tokens_of(at)] for at in sparse]
    places = [token for of in tokens for token in of]
    wanted = (lse - dense)[..., places].exp().mean(-1)
    valid = case.valid()
    kv_grid = {} if case.kv_segments is None else {"kv_grid": case.kv_sequence}
    found = chosen.recall(given["q"], given["k"], text_valid=valid)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    bare = vsa.Selection(chosen.bitmap, chosen.num_key_tiles)
    again = bare.recall(given["q"], given["k"], grid=case.sequence, text_valid=valid, **kv_grid)
    assert torch.equal(found, again)


@pytest.mark.parametrize("topk", [1.0, 3, vsa.TopP(0.5, floor=1.0)], ids=str)
def test_a_tile_without_a_real_token_neither_chooses_nor_is_chosen(topk: object) -> None:
    sequence = vsa.Sequence(
        [Segment(70, keys="compete", queries="sparse"), Segment(3), Segment((1, 4, 4))]
    )
    x = torch.randn(2, sequence.length, 1, 8)
    valid = torch.ones(2, sequence.text, dtype=torch.bool)
    valid[0, 64:70] = False
    _, selection = vsa.attention(
        x, x, x, topk, grid=sequence, text_valid=valid, return_selection=True
    )
    kept = selection.mask()
    assert not kept[0, :, :, 1].any() and not kept[0, :, 1].any()
    assert kept[1].all() and kept[0].any()


def test_what_nobody_attends_reaches_nothing() -> None:
    """NaN in a tile that competes and that no row keeps."""
    sequence = vsa.Sequence([Segment(70, queries="sparse"), (1, 5, 6), (3, 5, 6)])
    mask = torch.rand(1, 2, sequence.query_tiles, sequence.key_tiles) < 0.6
    mask[..., 0] = False
    tokens = {name: torch.randn(1, sequence.length, 2, 16).double() for name in "qkv"}
    poisoned = {name: x.clone() for name, x in tokens.items()}
    for name in "kv":
        poisoned[name][:, 70:74] = float("nan")  # the first row of the first video's first tile
    results = []
    for tensors in (tokens, poisoned):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        chosen = vsa.Selection.from_mask(mask, sequence)
        out, lse = vsa.block_sparse_attention(*leaves.values(), chosen, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    poisoned = {name: x.detach() for name, x in poisoned.items()}
    everything = vsa.Selection.from_mask(torch.ones_like(mask), sequence)
    assert vsa.block_sparse_attention(*poisoned.values(), everything).isnan().any()


def test_the_yardstick_is_what_pytorch_takes_by_default() -> None:
    """One that another kernel makes is another yardstick: of q 1.8 times as strict here."""
    case = replace(CASES["invalid text that competes"], dtype=torch.bfloat16, head_dim=64)
    _, selection, _ = attend(case, case.tensors(), backend="torch")
    chosen = selection.mask()
    expected = errors_of_sdpa(case, chosen)
    with sdpa_kernel(SDPBackend.MATH):
        assert errors_of_sdpa(case, chosen) == expected
