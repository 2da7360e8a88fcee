# SPDX-License-Identifier: Apache-2.0
"""Text ahead of the fine kernels: the kernel's source on a CPU, and the kernel on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.machines import machine_of, on_both
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends.kernels.forward import new_on
from vsa.backends.kernels.text import text_of
from vsa.values import bitmap

_C = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")


def rows_by_definition(valid: Tensor, grid: vsa.Grid) -> Tensor:
    parts = valid.split((grid.prefix, grid.suffix), 1)
    padded = [functional.pad(part, (0, -part.shape[1] % 64)) for part in parts]
    return bitmap.pack(torch.cat(padded, 1)).view(torch.int64)


def clean_by_definition(x: Tensor, valid: Tensor, grid: vsa.Grid) -> Tensor:
    text = torch.cat((x[:, : grid.prefix], x[:, x.shape[1] - grid.suffix :]), 1)
    return text.masked_fill(~valid[:, :, None, None], 0)


def laid_out(x: Tensor, kind: str) -> Tensor:
    if kind == "heads outside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "part":
        return torch.cat((x, x), 2)[:, :, : x.shape[2]]
    return x


@on_both
@given(
    prefix=st.integers(0, 150),
    suffix=st.integers(0, 150),
    masked=st.booleans(),
    expanded=st.booleans(),
    kinds=st.lists(st.sampled_from(["contiguous", "heads outside", "part"]), max_size=4),
    head_dim=st.sampled_from([64, 128]),
)
@settings(max_examples=40, deadline=None)
def test_rows_and_copies_are_the_definition(
    prefix: int,
    suffix: int,
    masked: bool,
    expanded: bool,
    kinds: list[str],
    head_dim: int,
    machine: str,
) -> None:
    grid, batch = vsa.Grid((1, 2, 3), prefix=prefix, suffix=suffix), 2
    valid = torch.rand(batch, grid.text) < 0.5
    valid = valid[:1].expand(batch, -1) if expanded else valid
    xs = [
        laid_out(torch.randn(batch, grid.length, heads, head_dim).bfloat16(), kind).to(machine)
        for heads, kind in enumerate(kinds, start=1)
    ]
    for x in xs:
        x[:, :prefix][~valid[:, :prefix].to(machine)] = float("nan")
    device = torch.device(machine, 0) if machine == "cuda" else torch.device(machine)
    mask = valid.to(machine) if masked else None
    on = new_on(device)
    found = text_of(mask, batch, head_dim, (grid, grid), [(x, grid) for x in xs], on)
    for call in found.calls:
        machine_of(machine).run(call, device)
    if grid.text == 0:
        assert found.query_rows is found.key_rows is None and not found.calls
        return
    assert len(found.calls) == 1 and found.query_rows is found.key_rows
    rows = rows_by_definition(valid if masked else valid | True, grid)
    assert torch.equal(found.key_rows.cpu(), rows)
    for x, copy in zip(xs, found.clean, strict=True):
        assert copy.whole is x
        if masked:
            assert torch.equal(copy.text.cpu(), clean_by_definition(x.cpu(), valid, grid))
        else:
            assert copy.text is x


def test_queries_and_keys_with_texts_of_their_own() -> None:
    grids = vsa.Grid((1, 2, 3), prefix=3), vsa.Grid((1, 2, 3), suffix=70)
    found = text_of(None, 1, 64, grids, [], new_on(torch.device("cpu")))
    for call in found.calls:
        machine_of("cpu").run(call, torch.device("cpu"))
    assert found.query_rows.tolist() == [[7]] and found.key_rows.tolist() == [[-1, 63]]


@pytest.mark.parametrize(
    ("mask", "prefixes", "sentence"),
    [
        (torch.ones(1, 4) > 0, (3, 3), r"be \(B, prefix \+ suffix\) = \(1, 3\) .* is \(1, 4\)"),
        (torch.ones(2, 3) > 0, (3, 3), r"= \(1, 3\) .* its shape is \(2, 3\)"),
        (torch.ones(1, 3) > 0, (3, 4), r"prefix and suffix \(3, 0\) and \(4, 0\)"),
        (torch.ones(1, 3), (3, 3), "be a bool tensor, but it is torch.float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    mask: Tensor, prefixes: tuple[int, int], sentence: str
) -> None:
    queries, keys = (vsa.Grid((1, 2, 3), prefix=prefix) for prefix in prefixes)
    with pytest.raises(ValueError, match=f"^text_valid must .*{sentence}"):
        text_of(mask, 1, 64, (queries, keys), [], new_on(torch.device("cpu")))


def test_calls_that_the_kernel_does_not_take() -> None:
    tensor = _C.TextTensor(tokens=(16, 1, 1, 1), length=4, heads=1, clean=16)
    fields = {"valid": 0, "valid_batch_stride": 0, "valid_token_stride": 0, "batch": 1}
    fields |= {"prefix": 1, "suffix": 0, "head_dim": 64, "rows": 16}
    with pytest.raises(RuntimeError, match="the text of up to four tensors"):
        _C.CleanText(**fields, tensors=[tensor] * 5).emulate(2, 0)
    long = _C.TextTensor(tokens=(16, 1, 1, 1), length=1 << 30, heads=1 << 10, clean=16)
    with pytest.raises(RuntimeError, match="more than 31 bits can number"):
        _C.CleanText(**fields | {"prefix": 1 << 20}, tensors=[long]).emulate(2, 0)
