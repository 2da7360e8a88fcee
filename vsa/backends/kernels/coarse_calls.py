# SPDX-License-Identifier: Apache-2.0
"""The calls of ``vsa._C`` on small fp32 matrices: scores, the choice by them, the coarse attention.

Query heads that share a key head are rows of one matrix, of B * kv_heads matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vsa.backends.kernels import masked_calls
from vsa.backends.kernels.masked_calls import LocatedMask
from vsa.backends.kernels.tensors import Located, address, beginning
from vsa.backends.torch_coarse import row_slices

if TYPE_CHECKING:
    from vsa import _C

FLOAT_BYTES = 4


def product(
    left: Located, right: Located, out: Located, scale: float = 1.0, accumulate: bool = False
) -> _C.Product:
    """Out (matrices, rows, columns) = scale * left @ right.mT, or that added to it.

    Args:
        left: (matrices, rows, depth) fp32, any strides.
        right: (matrices, columns, depth), the same.
        out: the same.
        scale: a factor.
        accumulate: add to what ``out`` holds.
    """
    from vsa import _C

    matrices, rows, depth = left.shape
    return _C.Product(
        left=_view(left),
        right=_view(right),
        out=_view(out),
        matrices=matrices,
        rows=rows,
        columns=right.shape[1],
        depth=depth,
        scale=scale,
        accumulate=accumulate,
    )


def products_call(*products: _C.Product) -> _C.Products:
    """Up to three products that do not depend on each other, in one launch."""
    from vsa import _C

    return _C.Products(products=products)


def softmax_call(scores: Located) -> _C.SoftmaxRows:
    """The softmax of the rows of contiguous fp32 matrices, in place."""
    from vsa import _C

    matrices, rows, columns = scores.shape
    return _C.SoftmaxRows(scores=scores.data_ptr(), rows=matrices * rows, columns=columns)


def score_gradient_call(
    grad: Located, coarse: Located, values: Located, weights: Located, out: Located
) -> _C.ScoreGradient:
    """Out = weights * (grad @ values.mT - (grad * coarse).sum(-1, True)), fp32 of any strides.

    Args:
        grad: gradient of ``coarse``.
        coarse: (matrices, rows, head_dim), weights @ values.
        values: (matrices, columns, head_dim).
        weights: (matrices, rows, columns).
        out: like weights.
    """
    from vsa import _C

    matrices, rows, depth = grad.shape
    return _C.ScoreGradient(
        grad_outputs=_view(grad),
        outputs=_view(coarse),
        values=_view(values),
        weights=_view(weights),
        out=_view(out),
        matrices=matrices,
        rows=rows,
        columns=values.shape[1],
        depth=depth,
    )


def _view(x: Located) -> tuple[int, int, int, int]:
    """Address, and strides of matrix, row and column in elements."""
    matrix, row, column = x.stride()
    return x.data_ptr(), matrix, row, column


def score_numbers(matrices: int, rows: int, columns: int, most_bytes: int) -> int:
    """Scores that exist at a time."""
    return max(
        (some.stop - some.start) * (part.stop - part.start) * columns
        for some, part in row_slices(matrices, rows, columns * FLOAT_BYTES, most_bytes)
    )


class TimeOrder(NamedTuple):
    """Columns of scores that are slots of a ring: equal scores go in the order of time.

    Attributes:
        oldest: address of the slot, int64, that holds the ring's oldest chunk.
        ring: column that the ring begins at.
        per_slot: columns of a slot.
    """

    oldest: int
    ring: int
    per_slot: int


def select_call(
    scores: Located,
    must: Located | None,
    counts: Sequence[int],
    mass: float,
    query_tiles: int,
    first_row: int,
    bitmap: Located,
    weights: Located | None,
    order: TimeOrder | None = None,
) -> _C.SelectTiles:
    """The tiles that rows of scores (rows, n_k) keep, and with ``weights`` their softmax."""
    from vsa import _C

    return _C.SelectTiles(
        scores=scores.data_ptr(),
        must=address(must),
        bitmap=bitmap.data_ptr(),
        weights=address(weights),
        first_row=first_row,
        rows=scores.shape[0],
        columns=scores.shape[1],
        query_tiles=query_tiles,
        counts=list(counts),
        mass=mass,
        **(order or TimeOrder(0, 0, 0))._asdict(),
    )


class Choice(NamedTuple):
    """What rows of scores are made of and asked for.

    Attributes:
        q: (matrices, rows, head_dim) fp32, means of the queries' tiles; so are k and v of the keys.
        k: (matrices, n_k, head_dim).
        v: like k, or None without a coarse branch.
        scale: factor of the scores.
        forced: (n_q, words) int32, tiles always kept, or None.
        counts: least tiles of a row, one number or one per head.
        mass: least share of a row's softmax.
        query_tiles: n_q.
        mask: which tiles rows may choose, None for all.
        shares: like ``counts``, budgets that are a share of these, 0 for others.
        order: of the columns, where they are slots of a ring; without a mask.
        kv_sizes: (n_k,) int32 of padded tiles, whose empty ones nobody chooses; or None.
    """

    q: Located
    k: Located
    v: Located | None
    scale: float
    forced: Located | None
    counts: Sequence[int]
    mass: float
    query_tiles: int
    mask: LocatedMask | None = None
    shares: Sequence[float] = ()
    order: TimeOrder | None = None
    kv_sizes: Located | None = None


def hide_empty_calls(scores: Located, kv_sizes: Located | None) -> Iterator[_C.HideEmpty]:
    """What keeps padded key tiles without a token out of rows of scores (..., n_k); or nothing."""
    from vsa import _C

    if kv_sizes is not None:
        *rows, columns = scores.shape
        yield _C.HideEmpty(
            scores=scores.data_ptr(),
            kv_sizes=kv_sizes.data_ptr(),
            rows=math.prod(rows),
            columns=columns,
        )


def choice_calls(
    of: Choice, scores: Located, bitmap: Located, coarse: Located | None, most_bytes: int
) -> Iterator[Any]:
    """Scores, the choice by them, and the coarse output, some rows at a time.

    Args:
        of: what is asked.
        scores: fp32 of scratch, ``score_numbers`` of them.
        bitmap: (matrices * rows, words) int32; the choice is written here.
        coarse: like q; the coarse output is written here. None without v.
        most_bytes: of scores that exist at a time.
    """
    from vsa import _C

    matrices, rows, _ = of.q.shape
    columns = of.k.shape[1]
    for some, part in row_slices(matrices, rows, columns * FLOAT_BYTES, most_bytes):
        at_once, of_each = some.stop - some.start, part.stop - part.start
        first, here = some.start * rows + part.start, beginning(scores, at_once, of_each, columns)
        flat = beginning(scores, at_once * of_each, columns)
        mask, query = of.mask, part.start
        of_scores = products_call(product(of.q[some, part], of.k[some], here, of.scale))
        yield masked_calls.products_call(of_scores, mask, query, _C.ROWS_AND_COLUMNS)
        yield from hide_empty_calls(here, of.kv_sizes)
        choice = select_call(
            flat,
            of.forced,
            of.counts,
            of.mass,
            of.query_tiles,
            first,
            bitmap[first:],
            None if of.v is None else flat,
            of.order,
        )
        yield masked_calls.select_call(choice, mask, of.shares)
        if of.v is not None and coarse is not None:
            of_out = products_call(product(here, of.v[some].mT, coarse[some, part]))
            yield masked_calls.products_call(of_out, mask, query, _C.ROWS_AND_DEPTH)


def attention_calls(
    means: Sequence[Located],
    scale: float,
    scores: Located,
    coarse: Located,
    most_bytes: int,
    mask: LocatedMask | None = None,
) -> Iterator[Any]:
    """The coarse output alone, where the choice is given, some rows at a time.

    Args:
        means: of q (matrices, rows, head_dim), and of k and v, (matrices, n_k, head_dim).
        scale: factor of the scores.
        scores: fp32 of scratch, ``score_numbers`` of them.
        coarse: like the means of q; the coarse output is written here.
        most_bytes: of scores that exist at a time.
        mask: which tiles rows may choose, None for all.
    """
    from vsa import _C

    q, k, v = means
    matrices, rows, _ = q.shape
    columns = k.shape[1]
    for some, part in row_slices(matrices, rows, columns * FLOAT_BYTES, most_bytes):
        here = beginning(scores, some.stop - some.start, part.stop - part.start, columns)
        first, query = some.start * rows + part.start, part.start
        of_scores = products_call(product(q[some, part], k[some], here, scale))
        yield masked_calls.products_call(of_scores, mask, query, _C.ROWS_AND_COLUMNS)
        yield masked_calls.softmax_call(softmax_call(here), mask, first)
        of_out = products_call(product(here, v[some].mT, coarse[some, part]))
        yield masked_calls.products_call(of_out, mask, query, _C.ROWS_AND_DEPTH)


def gradient_calls(
    grad: Located,
    coarse: Located,
    means: Sequence[Located],
    scale: float,
    grads: Sequence[Located],
    scratch: Sequence[Located],
    most_bytes: int,
    mask: LocatedMask | None = None,
    kv_sizes: Located | None = None,
) -> Iterator[Any]:
    """Gradients of the coarse attention, see ``coarse_backward``.

    Args:
        grad: gradient of ``coarse``.
        coarse: (matrices, rows, head_dim), the coarse output.
        means: of q, like ``coarse``, and of k and v, (matrices, n_k, head_dim).
        scale: factor of the scores.
        grads: like ``means``; what they hold does not matter.
        scratch: twice ``score_numbers`` fp32.
        most_bytes: of either scratch.
        mask: which tiles rows may choose, None for all.
        kv_sizes: (n_k,) int32 of padded tiles, whose empty ones take no part; or None.
    """
    from vsa import _C

    q, k, v = means
    dq, dk, dv = grads
    matrices, rows, _ = q.shape
    columns = k.shape[1]
    for some, part in row_slices(matrices, rows, columns * FLOAT_BYTES, most_bytes):
        shape = some.stop - some.start, part.stop - part.start, columns
        weights, of_scores = (beginning(x, *shape) for x in scratch)
        queries, upstream, more = q[some, part], grad[some, part], part.start > 0
        first, query = some.start * rows + part.start, part.start
        again = products_call(product(queries, k[some], weights, scale))
        yield masked_calls.products_call(again, mask, query, _C.ROWS_AND_COLUMNS)
        yield from hide_empty_calls(weights, kv_sizes)
        yield masked_calls.softmax_call(softmax_call(weights), mask, first)
        gradient = score_gradient_call(upstream, coarse[some, part], v[some], weights, of_scores)
        yield masked_calls.score_gradient_call(gradient, mask, query)
        three = products_call(
            product(weights.mT, upstream.mT, dv[some], 1.0, more),
            product(of_scores.mT, queries.mT, dk[some], scale, more),
            product(of_scores, k[some].mT, dq[some, part], scale),
        )
        sides = _C.DEPTH_AND_ROWS, _C.DEPTH_AND_ROWS, _C.ROWS_AND_DEPTH
        yield masked_calls.products_call(three, mask, query, *sides)
