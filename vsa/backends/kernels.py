# SPDX-License-Identifier: Apache-2.0
"""The fine stage by the project's own kernels: on a Hopper GPU, or emulated on a CPU.

Tensors are read and written where they are, through tensor maps over their strides. Only what TMA
cannot address is copied: strides or addresses that are no multiple of 16 bytes, batch elements that
do not follow each other as heads do when heads lie outside tokens, and queries of a scale that is
not positive. Text that is partly invalid is copied too, to put zeros in place of what must not be
attended; it is short.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vsa import bitmap
from vsa.backends.layout import Plan
from vsa.grid import SLOTS, Grid

EMULATED_BLOCKS = 2
"""Blocks of the persistent grid in the emulator: enough for each to have several work items."""
EMULATED_SEED = 0
"""Of the emulator's schedule: in which order agents run, and when copies and products land."""
ALIGNMENT = 16
"""Bytes that addresses and strides of a tensor map must be a multiple of."""
MOST_STRIDE = 2**40
"""Bytes that a stride of a tensor map must stay below."""

View = tuple[int, int, int, int]
"""Address, and strides of batch, token and head in elements."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, text_valid: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention``."""
    from vsa import _C

    if plan.scale <= 0:
        q, scale = q * (0 if plan.scale == 0 else -1), -plan.scale or 1.0
    else:
        scale = plan.scale
    q, k, v = (addressable(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    query_rows, key_rows = (
        text_rows(text_valid, q.shape[0], grid, q.device) for grid in _grids(plan)
    )
    clean = [_without_invalid_text(x, text_valid, plan.kv_grid) for x in (k, v)]
    words = words.contiguous()
    call = _C.FineForward(
        q=_views(q, q, plan.grid),
        k=_views(k, clean[0], plan.kv_grid),
        v=_views(v, clean[1], plan.kv_grid),
        out=_views(out, out, plan.grid),
        grid=plan.grid.as_ints(),
        kv_grid=plan.kv_grid.as_ints(),
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        bf16=q.dtype == torch.bfloat16,
        scale=scale,
        selected=words.data_ptr(),
        query_text_rows=query_rows.data_ptr(),
        key_text_rows=key_rows.data_ptr(),
        lse=lse.data_ptr(),
    )
    if q.device.type == "cpu":
        call.emulate(EMULATED_BLOCKS, EMULATED_SEED)
    else:
        with torch.cuda.device(q.device):
            call.launch(q.device.index, torch.cuda.current_stream().cuda_stream)
    return out, lse


def addressable(x: Tensor) -> Tensor:
    """The tensor (B, S, heads, head_dim), or a contiguous copy if no tensor map describes it."""
    batch, token, head, channel = x.stride()
    strides = [
        stride * x.element_size()
        for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
        if size > 1
    ]
    aligned = all(0 < bytes_ < MOST_STRIDE and bytes_ % ALIGNMENT == 0 for bytes_ in strides)
    inside = x.shape[2] == 1 or head < token
    foldable = inside or x.shape[0] == 1 or batch == head * x.shape[2]
    if channel == 1 and aligned and foldable and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def text_rows(text_valid: Tensor | None, batch: int, grid: Grid, device: torch.device) -> Tensor:
    """Which rows of the text's tiles are real tokens.

    Returns:
        (B, ceil(prefix / 64) + ceil(suffix / 64)) int64, bit r for row r.
    """
    if grid.text == 0:
        return torch.empty(batch, 0, dtype=torch.int64, device=device)
    if text_valid is None:
        text_valid = torch.ones(batch, grid.text, dtype=torch.bool, device=device)
    parts = (
        functional.pad(part, (0, -part.shape[1] % SLOTS))
        for part in text_valid.split((grid.prefix, grid.suffix), 1)
    )
    return bitmap.pack(torch.cat(list(parts), dim=1)).view(torch.int64)


def _without_invalid_text(x: Tensor, text_valid: Tensor | None, grid: Grid) -> Tensor:
    """The tensor, or a copy of its text alone with zeros if invalid, (B, text, heads, head_dim)."""
    if text_valid is None:
        return x
    text = torch.cat((x[:, : grid.prefix], x[:, x.shape[1] - grid.suffix :]), dim=1)
    return text.masked_fill_(~text_valid[:, :, None, None], 0)


def _views(x: Tensor, text: Tensor, grid: Grid) -> tuple[View, View, View]:
    """The video, the prefix and the suffix of x; the last two where ``text`` has them."""
    return (
        _view(x[:, grid.prefix : grid.prefix + grid.tokens]),
        _view(text[:, : grid.prefix]),
        _view(text[:, text.shape[1] - grid.suffix :]),
    )


def _view(x: Tensor) -> View:
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _grids(plan: Plan) -> tuple[Grid, Grid]:
    return plan.grid, plan.kv_grid
