# SPDX-License-Identifier: Apache-2.0
"""The fine stage by the project's own kernels: on a Hopper GPU, or emulated on a CPU.

Tensors are read and written where they are, through tensor maps over their strides. Only what TMA
cannot address is copied: strides or addresses that are no multiple of 16 bytes, batch elements that
do not follow each other as heads do when heads lie outside tokens, and queries of a scale that is
not positive. Text that is partly invalid is copied too, to put zeros in place of what must not be
attended; it is short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vsa.backends.layout import Plan
from vsa.values import bitmap
from vsa.values.grid import SLOTS, Extent, Grid

if TYPE_CHECKING:
    from vsa import _C

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


@dataclass(frozen=True)
class Gates:
    """The gates of a call, as they were broadcast.

    Attributes:
        fine: (B, S, heads, head_dim), of q's type or fp32, any strides; None for 1.
        coarse: likewise; None leaves the coarse branch out.
        coarse_rows: (B, heads, num_tiles, head_dim) fp32, contiguous, with ``coarse``.
    """

    fine: Tensor | None = None
    coarse: Tensor | None = None
    coarse_rows: Tensor | None = None

    def addresses(self) -> _C.Gates:
        """What the kernels are told of them; the tensors must outlive the launch."""
        from vsa import _C

        return _C.Gates(
            fine=_numbers(self.fine),
            coarse=_numbers(self.coarse),
            coarse_rows=address(self.coarse_rows),
        )


def _numbers(gate: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """Address, 1 for fp32, and strides; zeros where there is no gate."""
    if gate is None:
        return 0, 0, 0, 0, 0, 0
    batch, token, head, channel = gate.stride()
    return gate.data_ptr(), int(gate.dtype == torch.float32), batch, token, head, channel


def address(x: Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if x is None else x.data_ptr()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    text_valid: Tensor | None,
    plan: Plan,
    gates: Gates | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in ``vsa.ops.block_sparse_attention``.

    With ``gates`` the output is combine's, rounded once: the fine stage's part of it is never
    written.
    """
    from vsa import _C

    sign, scale = positive_scale(plan.scale)
    q, k, v = addressable(q * sign if sign != 1 else q), addressable(k), addressable(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    words, rows = words.contiguous(), rows_of_text(text_valid, q, plan)
    clean = [without_invalid_text(x, text_valid, plan.kv_grid) for x in (k, v)]
    axes = neighbour_axes(words, plan.grid.tiles, q.shape[2])
    tile_counter = torch.empty(1, dtype=torch.int32, device=q.device)
    call = _C.FineForward(
        problem=problem(q, k, words, axes, rows, scale, plan),
        q=views(q, q, plan.grid),
        k=views(k, clean[0], plan.kv_grid),
        v=views(v, clean[1], plan.kv_grid),
        out=views(out, out, plan.grid),
        gates=(gates or Gates()).addresses(),
        lse=lse.data_ptr(),
        tile_counter=tile_counter.data_ptr(),
    )
    run(call, q.device)
    return out, lse


def combine(fine: Tensor, gates: Gates, grid: Grid) -> Tensor:
    """Both branches together: gate_fine * fine + gate_coarse * coarse[tile of the token].

    Args:
        fine: (B, S, heads, head_dim), contiguous.
        gates: of the shape of ``fine``.
        grid: of the queries.
    """
    from vsa import _C

    out = torch.empty_like(fine)
    call = _C.Combine(
        fine=view(fine),
        out=view(out),
        gates=gates.addresses(),
        grid=grid.as_ints(),
        batch=fine.shape[0],
        heads=fine.shape[2],
        head_dim=fine.shape[3],
        dtype=dtype_name(fine),
    )
    run(call, fine.device)
    return out


def neighbour_axes(words: Tensor, tiles: Extent, groups: int) -> Tensor:
    """Along which axis the tiles that a block works on together are neighbours.

    Consumers of a block share what more than one of them wants, so each head takes the axis along
    which neighbours have more in common, judged by a sample of its tiles.

    Args:
        words: (B, heads, num_tiles, words) int32, a bitmap row of every tile; contiguous.
        tiles: how many there are along t, h and w.
        groups: of heads, each of which decides as one: heads that follow each other.

    Returns:
        (B, groups) int32, ``_C.ALONG_W`` or ``_C.ALONG_T``.
    """
    from vsa import _C

    batch, heads, _, row_words = words.shape
    axes = words.new_empty(batch, groups)
    call = _C.AxisChoice(
        bitmap=words.data_ptr(),
        axes=axes.data_ptr(),
        batch=batch,
        heads=heads,
        groups=groups,
        words=row_words,
        tiles=tiles,
    )
    run(call, words.device)
    return axes


def positive_scale(scale: float) -> tuple[int, float]:
    """A factor for q and a positive scale: the kernels look for the largest score."""
    if scale > 0:
        return 1, scale
    return (0 if scale == 0 else -1), -scale or 1.0


def rows_of_text(
    text_valid: Tensor | None, q: Tensor, plan: Plan
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the queries and those of the keys."""
    query_rows, key_rows = (
        text_rows(text_valid, q.shape[0], grid, q.device) for grid in (plan.grid, plan.kv_grid)
    )
    return query_rows, key_rows


def problem(
    q: Tensor,
    k: Tensor,
    words: Tensor,
    query_axes: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    scale: float,
    plan: Plan,
) -> _C.FineProblem:
    """What both directions are told. The tensors must outlive the launch."""
    from vsa import _C

    return _C.FineProblem(
        grid=plan.grid.as_ints(),
        kv_grid=plan.kv_grid.as_ints(),
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=dtype_name(q),
        scale=scale,
        bitmap=words.data_ptr(),
        query_axes=query_axes.data_ptr(),
        query_text_rows=address(rows[0]),
        key_text_rows=address(rows[1]),
    )


def dtype_name(x: Tensor) -> str:
    """The dtype as the compiled part names it."""
    return str(x.dtype).removeprefix("torch.")


class Call(Protocol):
    """A call of the compiled part, which holds addresses: its tensors must outlive the run."""

    def launch(self, device: int, stream: int) -> None:
        """Launch the kernels on a GPU."""

    def emulate(self, blocks: int, seed: int) -> None:
        """Run the same kernels on the CPU."""


def run(call: Call, device: torch.device) -> None:
    """Run a call where its tensors are: on the emulator for CPU tensors."""
    run_by(call.launch, call.emulate, device)


def run_by(
    launch: Callable[[int, int], None], emulate: Callable[[int, int], None], device: torch.device
) -> None:
    """Either method of a call: launch(device, stream), or emulate(blocks, seed) on a CPU."""
    if device.type == "cpu":
        emulate(EMULATED_BLOCKS, EMULATED_SEED)
    else:
        launch(device.index, torch.cuda.current_stream(device).cuda_stream)


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


def text_rows(
    text_valid: Tensor | None, batch: int, grid: Grid, device: torch.device
) -> Tensor | None:
    """Which rows of the text's tiles are real tokens.

    Returns:
        (B, ceil(prefix / 64) + ceil(suffix / 64)) int64, bit r for row r; None without text.
    """
    if grid.text == 0:
        return None
    if text_valid is None:
        text_valid = torch.ones(batch, grid.text, dtype=torch.bool, device=device)
    parts = (
        functional.pad(part, (0, -part.shape[1] % SLOTS))
        for part in text_valid.split((grid.prefix, grid.suffix), 1)
    )
    return bitmap.pack(torch.cat(list(parts), dim=1)).view(torch.int64)


def without_invalid_text(x: Tensor, text_valid: Tensor | None, grid: Grid) -> Tensor:
    """The tensor, or a copy of its text alone with zeros if invalid, (B, text, heads, head_dim)."""
    if text_valid is None:
        return x
    text = torch.cat((x[:, : grid.prefix], x[:, x.shape[1] - grid.suffix :]), dim=1)
    return text.masked_fill_(~text_valid[:, :, None, None], 0)


def views(x: Tensor, text: Tensor, grid: Grid) -> tuple[View, View, View]:
    """The video, the prefix and the suffix of x; the last two where ``text`` has them.

    By arithmetic: slices would be nine tensors more per call.
    """
    of_text = view(text)
    return (
        _from_token(view(x), grid.prefix, x),
        of_text,
        _from_token(of_text, text.shape[1] - grid.suffix, text),
    )


def view(x: Tensor) -> View:
    """What the kernels are told of a tensor (B, tokens, heads, head_dim)."""
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _from_token(whole: View, token: int, x: Tensor) -> View:
    """The view of x that starts at a token."""
    address, batch, stride, head = whole
    return address + token * stride * x.element_size(), batch, stride, head


def text_tiles(grid: Grid) -> int:
    """Runs of 64 tokens that the text before and after the video is cut into."""
    return -(-grid.prefix // SLOTS) - (-grid.suffix // SLOTS)
