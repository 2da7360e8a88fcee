# SPDX-License-Identifier: Apache-2.0
"""Infinity and NaN in low precision: never a finite number where native has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends import torch_low_precision as simulated

GRID = vsa.Grid((4, 5, 12), prefix=5, suffix=70)
precisions = pytest.mark.parametrize("precision", ["int8", "fp8"])
backends = pytest.mark.parametrize("backend", ["torch", "emulated"])
VALUES = (torch.inf, -torch.inf, torch.nan)


@pytest.fixture(autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params.get("backend") == "emulated":
        pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, GRID.length, heads, 64) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def attend(
    tensors: list[Tensor], selection: vsa.Selection, precision: str, backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    return vsa.attention(
        *tensors, None, grid=GRID, selection=selection, precision=precision, backend=backend,
        return_lse=True, **options,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


@backends
@precisions
@pytest.mark.parametrize("seed", range(8))
def test_what_is_not_finite_in_native_is_not_here(seed: int, precision: str, backend: str) -> None:
    """Few values anywhere, text included, some in tokens that are not valid."""
    tensors, generator = draw(), torch.Generator().manual_seed(seed)
    selection = vsa.select(tensors[0], tensors[1], 1, grid=GRID)
    valid = torch.arange(150).view(2, 75) % 3 > 0
    x = tensors[seed % 3]
    for place in torch.randint(x.numel(), (1 + seed % 2,), generator=generator).tolist():
        x.view(-1)[place] = VALUES[int(torch.randint(3, (), generator=generator))]
    out, lse = attend(tensors, selection, precision, backend, text_valid=valid)
    native, native_lse = attend(tensors, selection, "native", "torch", text_valid=valid)
    assert not out.isfinite()[~native.isfinite()].any()
    nothing = native_lse == -torch.inf
    assert not lse.isfinite()[~native_lse.isfinite() & ~nothing].any()
    assert not out.isinf().any()  # but NaN
    # What it reaches is what it reaches in native, but for keys of minus infinity, which native
    # may give a weight of zero, and for whole rows of values.
    assert out.isfinite().float().mean() > 0.3


@backends
@precisions
def test_rows_that_attend_nothing_are_zeros_whatever_lies_beside_them(precision, backend) -> None:
    tensors = draw()
    valid = torch.zeros(2, 75, dtype=torch.bool)
    mask = torch.zeros(2, 4, GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    mask[..., 2, 3] = True
    clean = vsa.Grid(GRID.shape).tile_of_token()
    for at, x in enumerate(tensors):
        video = x[:, 5:-70]
        video[:, clean == (0 if at == 0 else 1)] = VALUES[at]
        x[:, :5], x[:, -70:] = torch.nan, torch.inf
    selection = vsa.Selection.from_mask(mask, GRID)
    out, lse = attend(tensors, selection, precision, backend, text_valid=valid)
    attends = torch.zeros(GRID.length, dtype=torch.bool)
    attends[5:-70] = clean == 2
    assert (out[:, ~attends] == 0).all() and (lse[..., ~attends] == -torch.inf).all()
    assert out[:, attends].isfinite().all() and lse[..., attends].isfinite().all()


@backends
@precisions
def test_gates_of_what_is_no_token_do_not_matter(precision, backend) -> None:
    tensors = draw()
    selection = vsa.select(tensors[0], tensors[1], 1, grid=GRID)
    valid = torch.arange(150).view(2, 75) % 3 > 0
    gates = {name: torch.ones(2, GRID.length, 4, 64) for name in ("gate_fine", "gate_coarse")}
    options = {"text_valid": valid, **gates}
    expected, _ = attend(tensors, selection, precision, backend, **options)
    unreal = torch.cat((~valid[:, :5], valid.new_zeros(2, GRID.tokens), ~valid[:, 5:]), 1)
    for gate in gates.values():
        gate[unreal] = torch.nan
    found, _ = attend(tensors, selection, precision, backend, **options)
    assert torch.equal(found, expected) and (found[unreal] == 0).all()


@precisions
def test_versions_of_pytorch_that_convert_to_e4m3_in_other_ways_agree(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit becomes NaN in PyTorch 2.11, and 448 in 2.13: it never gets there."""
    convert, seen = Tensor.to, []

    def strictly(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch.float8_e4m3fn in args:
            seen.append(x)
            assert (x.isnan() | (x.abs() <= 448)).all(), x
        return convert(x, *args, **options)

    monkeypatch.setattr(Tensor, "to", strictly)
    inputs = torch.tensor([torch.inf, -torch.inf, torch.nan, 449, 1e9, -465, 17])
    expected = torch.tensor([448, -448, torch.nan, 448, 448, -448, 16])  # 17: half way, to even
    torch.testing.assert_close(simulated._e4m3(inputs), expected, equal_nan=True, rtol=0, atol=0)
    tensors = draw()
    selection = vsa.select(tensors[0], tensors[1], 1, grid=GRID)
    for x, value in zip(tensors, VALUES, strict=True):
        x[0, 9, 0, 3] = value
    attend(tensors, selection, precision, "torch")
    assert len(seen) > 3
