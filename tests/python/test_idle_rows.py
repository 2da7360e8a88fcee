# SPDX-License-Identifier: Apache-2.0
"""Tokens that attend nothing contribute nothing, whatever lies in their rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vsa

GRID = vsa.Grid((4, 4, 8), prefix=3, suffix=5)
VALID = torch.tensor([[True, False, True, True, False, True, False, False]])
NONE_VALID = torch.zeros_like(VALID)
EMPTY_ROWS = torch.tensor([[[[1, 0], [0, 0]], [[1, 1], [0, 1]]]]).bool()


def differentiate(
    machine: tuple[str, str, torch.dtype, int], bad: float, gated: bool, empty: bool, valid: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Output and gradients by name, and which tokens are no text, with ``bad`` in all rows there.

    Everything else is the same in every call.
    """
    backend, device, dtype, head_dim = machine
    text = torch.arange(GRID.length).split((GRID.prefix, GRID.tokens, GRID.suffix))
    invalid = torch.zeros(GRID.length, dtype=torch.bool)
    invalid[torch.cat((text[0], text[2]))[~valid[0]]] = True
    generator = torch.Generator().manual_seed(1)

    def poisoned(*shape: int) -> Tensor:
        x = torch.randn(1, GRID.length, *shape, generator=generator).to(dtype)
        x[:, invalid] = bad
        return x.to(device)

    names = ["q", "k", "v", *["gate_fine", "gate_coarse"] * gated]
    leaves = {name: poisoned(2, head_dim).requires_grad_() for name in names}
    upstream, upstream_lse = poisoned(2, head_dim), poisoned(2).transpose(1, 2)
    selection = vsa.Selection.from_mask(EMPTY_ROWS.to(device), GRID) if empty else None
    out, lse = vsa.attention(
        **leaves,
        topk=None if empty else 1,
        grid=GRID,
        text_valid=valid.to(device),
        selection=selection,
        return_lse=True,
        backend=backend,
    )
    grads = torch.autograd.grad(
        [out, lse], list(leaves.values()), [upstream, upstream_lse.to(lse.dtype)]
    )
    found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
    return {name: x.cpu() for name, x in found.items()}, invalid


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 6e4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("valid", [VALID, NONE_VALID], ids=["some-text", "no-text"])
@pytest.mark.parametrize("kind", ["torch", "16-bit", "kernels-64", "kernels-128"])
def test_what_lies_in_rows_of_no_token_reaches_nothing(
    kind: str, valid: Tensor, empty: bool, gated: bool, bad: float, machine: tuple[str, str]
) -> None:
    backend, device = machine
    of_kind = {
        "torch": ("torch", device, torch.float32, 16),
        "16-bit": ("torch", device, torch.bfloat16, 64),
        "kernels-64": (backend, device, torch.bfloat16, 64),
        "kernels-128": (backend, device, torch.float16, 128),
    }[kind]
    clean, invalid = differentiate(of_kind, 0.0, gated, empty, valid)
    found, _ = differentiate(of_kind, bad, gated, empty, valid)
    assert clean["out"][:, ~invalid].abs().max() > 0.1
    for name, x in found.items():
        assert torch.equal(x[:, ~invalid], clean[name][:, ~invalid]), name
        assert torch.equal(x[:, invalid], torch.zeros_like(x[:, invalid])), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("kind", ["torch", "kernels"])
def test_a_video_query_without_any_tile_reaches_nothing(
    kind: str, bad: float, machine: tuple[str, str]
) -> None:
    backend, device = machine
    dtype, head_dim = (torch.float32, 16) if kind == "torch" else (torch.bfloat16, 64)
    grid = vsa.Grid((4, 4, 8))
    selection = vsa.Selection.from_mask(EMPTY_ROWS.to(device), grid)
    idle = ~EMPTY_ROWS.any(-1)[0].repeat_interleave(64, dim=1)  # (heads, tokens)
    in_order = grid.from_tiles(idle.T.view(1, 2, 64, 2))[0].T
    found = []
    for value in (0.0, bad):
        generator = torch.Generator().manual_seed(2)
        q, k, v, up = torch.randn(4, 1, grid.length, 2, head_dim, generator=generator).to(dtype)
        q[0][in_order.T] = value
        leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
        out, lse = vsa.block_sparse_attention(
            *leaves, selection, return_lse=True, backend="torch" if kind == "torch" else backend
        )
        grads = torch.autograd.grad(out, leaves, up.to(device))
        found.append([x.cpu() for x in (out.detach(), lse.detach(), *grads)])
    assert in_order.any() and not in_order.all()
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
    assert (found[1][1][0].isinf() == in_order).all()
