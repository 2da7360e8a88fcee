# SPDX-License-Identifier: Apache-2.0
"""Keys and values in eight bits: images of tiles against the simulation, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import machine_of, on_both
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends.kernels.low_precision import quantise
from vsa.backends.tiles import token_valid
from vsa.backends.torch_low_precision import Keys, key_slots
from vsa.values.grid import SLOTS

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

precisions = pytest.mark.parametrize("precision", ["int8", "fp8"])
SUM_ROWS = 8


def swizzled(rows: int, row_bytes: int) -> Tensor:
    """Where byte (row, byte) of a tile lies, by the definition of both swizzles."""
    place = torch.arange(rows * row_bytes)
    return place ^ ((place >> 7 & (7 if row_bytes == 128 else 3)) << 4)


def key_places() -> Tensor:
    """Where each of 64 keys stands along the reduction of weights and values."""
    key = torch.arange(SLOTS)
    return key // 16 * 16 + key // 2 % 4 * 4 + key // 8 % 2 * 2 + key % 2


def unpacked(image: Tensor, head_dim: int, precision: str) -> dict[str, Tensor]:
    """Images (tiles, bytes) as numbers in the order of tokens."""
    of_keys, of_values = SLOTS * head_dim, (head_dim + SUM_ROWS) * SLOTS
    keys, values, scale = image.cpu().split((of_keys, of_values, 16), dim=1)
    keys = keys[:, swizzled(SLOTS, head_dim)].reshape(-1, SLOTS, head_dim)
    kind = torch.int8 if precision == "int8" else torch.float8_e4m3fn
    values = values[:, swizzled(head_dim + SUM_ROWS, SLOTS)].reshape(-1, head_dim + SUM_ROWS, SLOTS)
    values = values[:, :, key_places()].contiguous().view(torch.float8_e4m3fn).float().mT
    return {
        "k": keys.contiguous().view(kind).float(),
        "k_scale": scale.contiguous().view(torch.float32)[:, 0],
        "v": values[..., :head_dim],
        "sums": values[..., head_dim:],
    }


def check(
    k: Tensor, v: Tensor, grid: vsa.Grid, valid: Tensor | None, precision: str, machine: str
) -> None:
    """All heads of all batch elements."""
    on_machine = (x.to(machine) for x in (k, v))
    found = quantise(
        machine_of(machine), *on_machine, grid, None if valid is None else valid.to(machine),
        precision,
    )  # fmt: skip
    real = token_valid(valid, grid, k.device)
    tokens = key_slots(grid, k.device)
    tokens = functional.pad(tokens, (0, SLOTS - tokens.shape[1]), value=-1)
    for batch in range(k.shape[0]):
        for head in range(k.shape[2]):
            wanted = Keys.quantise(
                k[batch, :, head], v[batch, :, head], tokens, real[batch % len(real)],
                grid, precision,
            )  # fmt: skip
            got = unpacked(found.images[batch, head], k.shape[-1], precision)
            mean, scale = found.channels[batch, head].cpu()
            assert torch.equal(mean, wanted.mean) and torch.equal(scale, wanted.v_scale)
            there = wanted.real[:-1]
            attended = there.any(-1)
            same = dict(rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                got["k_scale"][attended], wanted.k_scale[:-1][attended], **same
            )
            finite = there & ~wanted.k_scale[:-1, None].isnan()
            torch.testing.assert_close(got["k"][finite], wanted.k[:-1][finite], **same)
            torch.testing.assert_close(got["v"], wanted.v[:-1], **same)
            assert torch.equal(got["sums"][..., 0], there.float())
            assert not got["sums"][..., 1:].any()
            for tile in attended.nonzero().flatten():
                first = there[tile].nonzero()[0, 0]
                if finite[tile].any():  # rows without a token hold another key of the tile
                    filled = got["k"][tile][~there[tile]]
                    assert torch.equal(filled, got["k"][tile, first].expand_as(filled))


def draw(grid: vsa.Grid, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, grid.length, heads, head_dim, generator=generator)
    offset = torch.randn(heads, head_dim, generator=generator) * 5
    return [(x[0] + offset).to(dtype), x[1].to(dtype)]


@on_both
@precisions
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_are_the_simulation(machine, precision, head_dim, dtype) -> None:
    grid = vsa.Grid((5, 6, 9), tile=(3, 5, 4), prefix=70, suffix=3)
    k, v = draw(grid, 3, head_dim, dtype, 0)
    valid = torch.rand(2, grid.text, generator=torch.Generator().manual_seed(1)) < 0.5
    valid[1, :64] = False  # a tile without any
    check(k, v, grid, None, precision, machine)
    check(k, v, grid, valid, precision, machine)


@on_both
@given(
    seed=st.integers(0, 2**16),
    precision=st.sampled_from(["int8", "fp8"]),
    video=st.tuples(*[st.integers(1, 9)] * 3),
    tile=st.sampled_from([(4, 4, 4), (3, 5, 4), (1, 2, 3), (1, 1, 64), (1, 1, 1)]),
    text=st.tuples(st.integers(0, 70), st.integers(0, 3)),
)
@settings(max_examples=25, deadline=None)
def test_images_of_any_grid_are_the_simulation(seed, precision, video, tile, text, machine) -> None:
    grid = vsa.Grid(video, tile=tile, prefix=text[0], suffix=text[1])
    k, v = draw(grid, 1, 64, torch.bfloat16, seed)
    check(k, v, grid, None, precision, machine)


@on_both
@precisions
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_are_marked(machine, precision, value) -> None:
    grid = vsa.Grid((4, 8, 8))
    k, v = draw(grid, 2, 64, torch.bfloat16, 3)
    k[0, 0, 0, 7] = value  # sampled for the mean
    k[0, 100, 1, 3] = value
    v[1, 77, 0, 9] = value
    check(k, v, grid, None, precision, machine)
    found = quantise(machine_of(machine), k.to(machine), v.to(machine), grid, None, precision)
    scales = torch.stack(
        [unpacked(images, 64, precision)["k_scale"] for images in found.images.flatten(0, 1)]
    )
    assert scales.isnan().sum(-1).tolist() == [1, 1, 0, 0]
    assert found.channels.isfinite().all()


@on_both
@precisions
def test_zeros_and_the_smallest_and_largest_numbers(machine, precision) -> None:
    grid = vsa.Grid((4, 4, 8))
    for magnitude in (0.0, 1e-38, 1e-20, 1e20, 3e38):
        k, v = (x * magnitude for x in draw(grid, 1, 128, torch.bfloat16, 4))
        k, v = (x.nan_to_num(posinf=3e38, neginf=-3e38) for x in (k, v))
        check(k, v, grid, None, precision, machine)


@on_both
def test_views_give_the_bits_of_copies(machine) -> None:
    grid = vsa.Grid((4, 8, 8), prefix=5)
    fused = torch.randn(2, grid.length, 3, 2, 64, generator=torch.Generator().manual_seed(5))
    fused = fused.bfloat16().to(machine)
    views = [fused[:, :, 1], fused[:, :, 2]]
    odd = torch.randn(2, grid.length, 2, 65).bfloat16().to(machine)[..., 1:]
    for k, v in (views, [odd, odd]):
        found, wanted = (
            quantise(machine_of(machine), *pair, grid, None, "int8")
            for pair in ((k, v), (k.clone(), v.clone()))
        )
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.channels, wanted.channels)
