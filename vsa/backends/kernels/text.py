# SPDX-License-Identifier: Apache-2.0
"""Text ahead of the fine kernels: which rows are real tokens, and copies without the others.

Products give the rows of invalid text no weight, but zero times NaN is NaN, and they are loaded
with the rest of their tiles. So what is multiplied after softmax comes from a copy of the text
with zeros there; it is short. Where all text is valid, it is read where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vsa.backends.kernels.calls import Grids, Located3
from vsa.backends.kernels.tensors import Located, address, text_tiles, view
from vsa.values.grid import Grid

if TYPE_CHECKING:
    from vsa import _C

Make = Callable[[Sequence[int], torch.dtype], Located]
"""A new contiguous tensor, or a part of a workspace."""


class Text(NamedTuple):
    """What the fine kernels are told of text.

    Attributes:
        query_rows: (B, text tiles of the queries) int64, bit r for row r; None without text.
        key_rows: the same of the keys.
        clean: the tensors that were asked for, with their text.
        calls: what makes all of it.
    """

    query_rows: Located | None
    key_rows: Located | None
    clean: list[Located3]
    calls: list[_C.CleanText]


def text_of(
    valid: Located | None,
    batch: int,
    head_dim: int,
    grids: Grids,
    xs: Sequence[tuple[Located, Grid]],
    make: Make,
) -> Text:
    """Rows of text, and the text of some tensors, at most four.

    Args:
        valid: (B, prefix + suffix) bool, or None where all text is valid.
        batch: B.
        head_dim: of all tensors.
        grids: of the queries and of the keys.
        xs: tensors (B, tokens, heads, head_dim) of 16 bits, and the grid of each.
        make: for what is written.

    Raises:
        ValueError: a mask that does not fit, which an operator alone can bring here.
    """
    if valid is not None:
        _check_mask(valid, batch, grids)
    if valid is None or not grids[0].text:
        clean = [Located3(x, x) for x, _ in xs]
    else:
        clean = [Located3(x, make((batch, of.text, *x.shape[2:]), x.dtype)) for x, of in xs]
    rows: dict[tuple[int, int], Located] = {}
    calls = []
    for grid in grids:  # both are written at once where their text is the same
        text = grid.prefix, grid.suffix
        if grid.text and text not in rows:
            rows[text] = make((batch, text_tiles(grid)), torch.int64)
            copied = () if valid is None else zip(clean, (of for _, of in xs), strict=True)
            calls.append(_call(valid, batch, head_dim, grid, rows[text], list(copied)))
    of_queries, of_keys = (rows.get((grid.prefix, grid.suffix)) for grid in grids)
    return Text(of_queries, of_keys, clean, calls)


def _call(
    valid: Located | None,
    batch: int,
    head_dim: int,
    text: Grid,
    rows: Located,
    copied: Sequence[tuple[Located3, Grid]],
) -> _C.CleanText:
    from vsa import _C

    by_batch, by_token = (0, 0) if valid is None else valid.stride()
    return _C.CleanText(
        valid=address(valid),
        valid_batch_stride=by_batch,
        valid_token_stride=by_token,
        batch=batch,
        prefix=text.prefix,
        suffix=text.suffix,
        head_dim=head_dim,
        rows=rows.data_ptr(),
        tensors=[
            _C.TextTensor(
                tokens=view(x.whole),
                length=grid.length,
                heads=x.whole.shape[2],
                clean=x.text.data_ptr(),
            )
            for x, grid in copied
        ],
    )


def _check_mask(valid: Located, batch: int, grids: Grids) -> None:
    """The kernel goes by the grid, so a shorter mask would be read past its end."""
    texts = [(grid.prefix, grid.suffix) for grid in grids]
    if texts[0] != texts[1] or tuple(valid.shape) != (batch, grids[0].text):
        raise ValueError(
            f"text_valid must be (B, prefix + suffix) = {(batch, grids[0].text)} of queries and "
            f"keys with the same text, but its shape is {tuple(valid.shape)}, and they have "
            f"prefix and suffix {texts[0]} and {texts[1]}"
        )
    if valid.dtype is not torch.bool:
        raise ValueError(f"text_valid must be a bool tensor, but it is {valid.dtype}")
