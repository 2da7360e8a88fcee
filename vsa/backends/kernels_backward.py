# SPDX-License-Identifier: Apache-2.0
"""Gradients of the fine stage by the project's own kernels, gates included.

One pass over the tokens for what belongs to a query alone (and for the gates), one over the key
tiles for dK and dV, which walks the transposed selection, and one over the query tiles for dQ. What
was saved is q, k, v, out, the log-sum-exp and the bitmap; there is no copy in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vsa import bitmap
from vsa.backends import kernels
from vsa.backends.layout import Plan
from vsa.grid import SLOTS


@dataclass
class Gates:
    """The gates of a call, and their gradients once the backward has run.

    Attributes:
        fine: (B, S, heads, head_dim), of q's type or fp32, any strides; or None.
        coarse: likewise.
        coarse_rows: (B, heads, num_tiles, head_dim) fp32, with ``coarse``.
    """

    fine: Tensor | None
    coarse: Tensor | None
    coarse_rows: Tensor | None
    grad_fine: Tensor | None = None
    grad_coarse: Tensor | None = None
    grad_coarse_rows: Tensor | None = None

    def allocate(self) -> None:
        """Memory for the gradients."""
        if self.fine is not None:
            self.grad_fine = torch.empty(
                self.fine.shape, dtype=self.fine.dtype, device=self.fine.device
            )
        if self.coarse is not None and self.coarse_rows is not None:
            self.coarse_rows = self.coarse_rows.contiguous()
            self.grad_coarse = torch.empty(
                self.coarse.shape, dtype=self.coarse.dtype, device=self.coarse.device
            )
            self.grad_coarse_rows = torch.empty_like(self.coarse_rows)


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
    gates: Gates | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention_backward``.

    With ``gates``, ``grad_out`` is the gradient of the whole operation's output, and the gradients
    that belong to the gates are left in them. The same bits every time: nothing is added up by
    atomics.
    """
    from vsa import _C

    gates = gates or Gates(None, None, None)
    sign, scale = kernels.positive_scale(plan.scale)
    q = q if sign == 1 else q * sign
    q, k, v, out = (kernels.addressable(x) for x in (q, k, v, out))
    gradient, lse = kernels.addressable(grad_out), lse.contiguous()
    gates.allocate()
    grad_out = gradient if gates.fine is None else torch.empty_like(out)
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    words = words.contiguous()
    transposed, counts = transpose(words, plan.kv_grid.num_tiles)
    order = _longest_first(counts, k.shape[2], plan)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    query_tiles = plan.grid.num_tiles + kernels.text_tiles(plan.grid)
    row_stats = torch.empty(
        *q.shape[::2], query_tiles, 2, SLOTS, dtype=torch.float32, device=q.device
    )
    tickets = torch.empty(1, dtype=torch.int32, device=q.device)
    rows = kernels.rows_of_text(text_valid, q, plan)
    clean = [
        kernels.without_invalid_text(x, text_valid, grid)
        for x, grid in ((q, plan.grid), (k, plan.kv_grid), (v, plan.kv_grid))
    ]
    # With a fine gate the kernels write this gradient themselves, zeros included.
    clean.append(
        kernels.without_invalid_text(grad_out, text_valid, plan.grid)
        if gates.fine is None
        else grad_out
    )
    call = _C.FineBackward(
        q=kernels.views(q, clean[0], plan.grid),
        k=kernels.views(k, clean[1], plan.kv_grid),
        v=kernels.views(v, clean[2], plan.kv_grid),
        grad_out=kernels.views(grad_out, clean[3], plan.grid),
        grad_q=kernels.views(grads[0], grads[0], plan.grid),
        grad_k=kernels.views(grads[1], grads[1], plan.kv_grid),
        grad_v=kernels.views(grads[2], grads[2], plan.kv_grid),
        whole_out=kernels.view(out),
        whole_gradient=kernels.view(gradient),
        gates=kernels.gates(gates.fine, gates.coarse, gates.coarse_rows),
        whole_grad_out=kernels.view(grad_out),
        grad_gate_fine=_address(gates.grad_fine),
        grad_gate_coarse=_address(gates.grad_coarse),
        grad_coarse=_address(gates.grad_coarse_rows),
        scale=scale,
        transposed=transposed.data_ptr(),
        order=order.data_ptr(),
        lse=lse.data_ptr(),
        grad_lse=_address(grad_lse),
        tickets=tickets.data_ptr(),
        row_stats=row_stats.data_ptr(),
        **kernels.shared_arguments(q, k, words, rows, plan),
    )
    kernels.run(call, q.device)
    if sign != 1:
        grads[0] *= sign
    return grads[0], grads[1], grads[2]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
        kernels.launch(call, words.device)
    return target, counts


def _longest_first(counts: Tensor, kv_heads: int, plan: Plan) -> Tensor:
    """In which order the groups of neighbouring key tiles are worked on, within each key head.

    Args:
        counts: (B, heads, n_k) query tiles that attend each key tile.
        kv_heads: of the keys.
        plan: of the call.

    Returns:
        (B, kv_heads, groups) int64, by their longest column. The text's tiles come first in the
        numbering of groups: everyone attends them.
    """
    from vsa import _C

    group = _C.KEY_TILES_PER_GROUP
    if counts.shape[1] != kv_heads:
        counts = counts.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.int32)
    text = kernels.text_tiles(plan.kv_grid)
    if text:
        counts = functional.pad(counts, (text, 0), value=torch.iinfo(torch.int32).max)
    if odd := counts.shape[-1] % group:
        counts = functional.pad(counts, (0, group - odd))
    return counts.unflatten(-1, (-1, group)).amax(-1).argsort(dim=-1, descending=True, stable=True)
