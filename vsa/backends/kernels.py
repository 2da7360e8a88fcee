# SPDX-License-Identifier: Apache-2.0
"""The fine stage by the project's own kernels: on a Hopper GPU, or emulated on a CPU.

Tensors are read and written where they are, through tensor maps over their strides. Only what TMA
cannot address is copied: strides or addresses that are no multiple of 16 bytes, batch elements that
do not follow each other as heads do when heads lie outside tokens, and queries of a scale that is
not positive. Text that is partly invalid is copied too, to put zeros in place of what must not be
attended; it is short.
"""

from __future__ import annotations

from typing import Any

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

    sign, scale = _positive(plan.scale)
    q, k, v = addressable(q * sign if sign != 1 else q), addressable(k), addressable(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    words, rows = words.contiguous(), _text_rows(text_valid, q, plan)
    clean = [_without_invalid_text(x, text_valid, plan.kv_grid) for x in (k, v)]
    call = _C.FineForward(
        q=_views(q, q, plan.grid),
        k=_views(k, clean[0], plan.kv_grid),
        v=_views(v, clean[1], plan.kv_grid),
        out=_views(out, out, plan.grid),
        scale=scale,
        lse=lse.data_ptr(),
        **_shared_arguments(q, k, words, rows, plan),
    )
    _run(call, q.device)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention_backward``.

    The same bits every time: nothing is added up by atomics.
    """
    from vsa import _C

    sign, scale = _positive(plan.scale)
    q, k, v = addressable(q * sign if sign != 1 else q), addressable(k), addressable(v)
    grad_out, out, lse = addressable(grad_out), addressable(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    words = words.contiguous()
    transposed, counts = transpose(words, plan.kv_grid.num_tiles)
    order = _longest_first(counts, k.shape[2], plan)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    query_tiles = plan.grid.num_tiles + _text_tiles(plan.grid)
    row_stats = torch.empty(
        *q.shape[::2], query_tiles, 2, SLOTS, dtype=torch.float32, device=q.device
    )
    tickets = torch.empty(1, dtype=torch.int32, device=q.device)
    rows = _text_rows(text_valid, q, plan)
    clean = [
        _without_invalid_text(x, text_valid, grid)
        for x, grid in ((q, plan.grid), (k, plan.kv_grid), (v, plan.kv_grid), (grad_out, plan.grid))
    ]
    call = _C.FineBackward(
        q=_views(q, clean[0], plan.grid),
        k=_views(k, clean[1], plan.kv_grid),
        v=_views(v, clean[2], plan.kv_grid),
        grad_out=_views(grad_out, clean[3], plan.grid),
        grad_q=_views(grads[0], grads[0], plan.grid),
        grad_k=_views(grads[1], grads[1], plan.kv_grid),
        grad_v=_views(grads[2], grads[2], plan.kv_grid),
        whole_out=_view(out),
        whole_grad_out=_view(grad_out),
        scale=scale,
        transposed=transposed.data_ptr(),
        order=order.data_ptr(),
        lse=lse.data_ptr(),
        grad_lse=0 if grad_lse is None else grad_lse.data_ptr(),
        tickets=tickets.data_ptr(),
        row_stats=row_stats.data_ptr(),
        **_shared_arguments(q, k, words, rows, plan),
    )
    _run(call, q.device)
    if sign != 1:
        grads[0] *= sign
    return grads[0], grads[1], grads[2]


def transpose(words: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Bitmaps with rows and columns exchanged.

    Args:
        words: (B, heads, rows, words of ``columns`` bits) int32, contiguous.
        columns: bits of a row.

    Returns:
        (B, heads, columns, words of ``rows`` bits) int32, and how many bits each of its rows has,
        (B, heads, columns) int32.
    """
    from vsa import _C

    batch, heads, rows, _ = words.shape
    target = words.new_empty(batch, heads, columns, bitmap.num_words(rows))
    counts = words.new_empty(batch, heads, columns)
    call = _C.BitmapTranspose(
        source=words.data_ptr(),
        target=target.data_ptr(),
        counts=counts.data_ptr(),
        bitmaps=batch * heads,
        rows=rows,
        columns=columns,
    )
    if words.device.type == "cpu":
        call.run()
    else:
        _launch(call, words.device)
    return target, counts


def _longest_first(counts: Tensor, kv_heads: int, plan: Plan) -> Tensor:
    """In which order the groups of neighbouring key tiles are worked on, within each key head.

    Args:
        counts: (B, heads, n_k) query tiles that attend each key tile.
        kv_heads: of the keys.
        plan: of the call.

    Returns:
        (B, kv_heads, groups) int32, by their longest column. The text's tiles come first in the
        numbering of groups: everyone attends them.
    """
    from vsa import _C

    group = _C.KEY_TILES_PER_GROUP
    counts = counts.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.int32)
    counts = functional.pad(
        counts, (_text_tiles(plan.kv_grid), 0), value=torch.iinfo(torch.int32).max
    )
    counts = functional.pad(counts, (0, -counts.shape[-1] % group))
    longest = counts.unflatten(-1, (-1, group)).amax(-1)
    return longest.argsort(dim=-1, descending=True, stable=True).int()


def _positive(scale: float) -> tuple[int, float]:
    """A factor for q and a positive scale: the kernels look for the largest score."""
    if scale > 0:
        return 1, scale
    return (0 if scale == 0 else -1), -scale or 1.0


def _text_rows(text_valid: Tensor | None, q: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Those of the queries and those of the keys."""
    query_rows, key_rows = (
        text_rows(text_valid, q.shape[0], grid, q.device) for grid in (plan.grid, plan.kv_grid)
    )
    return query_rows, key_rows


def _shared_arguments(
    q: Tensor, k: Tensor, words: Tensor, rows: tuple[Tensor, Tensor], plan: Plan
) -> dict[str, Any]:
    """What both directions pass. Addresses: their tensors must outlive the launch."""
    return {
        "grid": plan.grid.as_ints(),
        "kv_grid": plan.kv_grid.as_ints(),
        "batch": q.shape[0],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_dim": q.shape[3],
        "bf16": q.dtype == torch.bfloat16,
        "selected": words.data_ptr(),
        "query_text_rows": rows[0].data_ptr(),
        "key_text_rows": rows[1].data_ptr(),
    }


def _run(call: Any, device: torch.device) -> None:
    if device.type == "cpu":
        call.emulate(EMULATED_BLOCKS, EMULATED_SEED)
    else:
        _launch(call, device)


def _launch(call: Any, device: torch.device) -> None:
    with torch.cuda.device(device):
        call.launch(device.index, torch.cuda.current_stream().cuda_stream)


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


def _text_tiles(grid: Grid) -> int:
    return -(-grid.prefix // SLOTS) - (-grid.suffix // SLOTS)
