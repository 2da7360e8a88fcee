# SPDX-License-Identifier: Apache-2.0
"""The stages on tile means in prepared calls: means, choice, coarse attention, and its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vsa.backends.kernels import masked_calls, sub_blocks
from vsa.backends.kernels.calls import means_call
from vsa.backends.kernels.coarse_backward import PROBABILITY_BYTES
from vsa.backends.kernels.coarse_calls import (
    Choice,
    attention_calls,
    choice_calls,
    gradient_calls,
    score_numbers,
)
from vsa.backends.kernels.masked_calls import LocatedMask
from vsa.backends.kernels.placeholder import Placeholder, Workspace
from vsa.backends.kernels.tensors import Located, as_matrices, beginning
from vsa.backends.torch_coarse import SCORE_BYTES
from vsa.values.bitmap import num_words
from vsa.values.task import Task

Shape = tuple[int, int, int, int]
Sizes = tuple[Located | None, Located | None]
"""Real tokens of padded tiles of the queries and of the keys, (tiles,) int32."""
NO_SIZES: Sizes = (None, None)


def mean_shapes(task: Task) -> tuple[Shape, Shape, Shape]:
    """Of the tile means of q, k and v: (B, heads, tiles, head_dim)."""
    batch, _, heads, head_dim = task.q.shape
    of_keys = batch, task.k.shape[2], task.kv_grid.num_tiles, head_dim
    return (batch, heads, task.grid.num_tiles, head_dim), of_keys, of_keys


def _matrices(task: Task) -> tuple[int, int]:
    """Batch elements and key heads, and rows of each: those of all query heads that share it."""
    batch, _, heads, _ = task.q.shape
    kv_heads = task.k.shape[2]
    return batch * kv_heads, heads // kv_heads * task.grid.num_tiles


def _mask(task: Task) -> LocatedMask | None:
    """The rule of a task, where there is one."""
    return LocatedMask(task.rule, None, task.grid.num_tiles) if task.rule else None


class CoarseForward:
    """Means, choice and coarse attention, as far as a task has them.

    Attributes:
        means: of q, k and v, or without a coarse gate and a tail of q and k; none of a choice that
            is given or made by the means of runs. For a tail alone those of q are not written.
        out: (B, heads, n_q, head_dim) fp32, the coarse output, or None without a coarse gate.
    """

    def __init__(
        self,
        task: Task,
        out: Placeholder | None,
        of_means: Workspace,
        work: Workspace,
        sizes: Sizes = NO_SIZES,
    ) -> None:
        self._task, self.out, self._sizes = task, out, sizes
        self._by_runs = task.chooses and task.runs > 1
        count = 2 if task.chooses and not self._by_runs else 0
        shapes = mean_shapes(task)[: 3 if out is not None or task.tail else count]
        self.means = [of_means.part(shape, torch.float32) for shape in shapes]
        self._of_tail_alone = not task.chooses and out is None
        matrices, rows = _matrices(task)
        if (self.means and not self._of_tail_alone) or self._by_runs:
            columns = task.kv_grid.num_tiles
            numbers = score_numbers(matrices, rows, columns, SCORE_BYTES)
            self._scores = work.part((numbers,), torch.float32)
        if self._by_runs:
            self._rows = (
                sub_blocks.rows_of_queries(
                    task.q, matrices, task.grid.num_tiles, task.runs, work.part
                ),
                sub_blocks.rows_of_keys(task.k, task.kv_grid.num_tiles, task.runs, work.part),
            )

    def calls(self, tokens: Sequence[Placeholder], bitmap: Placeholder) -> Iterator[Any]:
        """From q, k and v; a choice that is not given is written to ``bitmap``."""
        if self._by_runs:
            yield from self._calls_by_runs(tokens, bitmap)
        if not self.means or self._by_runs:
            return
        task, count = self._task, len(self.means)
        matrices, rows = _matrices(task)
        grids = (task.grid, task.kv_grid, task.kv_grid)[:count]
        first = 1 if self._of_tail_alone else 0
        sizes = (*self._sizes, self._sizes[1])[first:count]
        of_tiles = means_call(tokens[first:count], grids[first:], self.means[first:], sizes)
        yield masked_calls.means_call(of_tiles, task.rule, 1 - first)
        if self._of_tail_alone:
            return
        of_q, of_k, *of_v = (as_matrices(mean, matrices) for mean in self.means)
        out: Located | None = None if self.out is None else as_matrices(self.out, matrices)
        if task.chooses:
            words = beginning(bitmap, matrices * rows, num_words(task.kv_grid.num_tiles))
            yield from choice_calls(
                Choice(
                    q=of_q,
                    k=of_k,
                    v=None if out is None else of_v[0],
                    scale=task.scale,
                    forced=None,
                    counts=task.counts,
                    mass=task.mass,
                    query_tiles=task.grid.num_tiles,
                    mask=_mask(task),
                    shares=task.shares,
                    kv_sizes=self._sizes[1],
                ),
                self._scores,
                words,
                out,
                SCORE_BYTES,
            )
        elif out is not None:
            means = (of_q, of_k, *of_v)
            yield from attention_calls(
                means, task.scale, self._scores, out, SCORE_BYTES, _mask(task)
            )

    def in_two(
        self, tokens: Sequence[Placeholder], bitmap: Placeholder
    ) -> tuple[list[Any], list[Any]] | None:
        """``calls`` as those that read q and k alone, which make the choice, and those after them.

        None where that is not how they come: scores of several slices take turns in one memory,
        and means of runs and of tiles are one pass.
        """
        calls = list(self.calls(tokens, bitmap))
        if not self._task.chooses or self._task.tail or self._task.padded is not None:
            return None
        if self.out is None:
            return calls, []
        if self._by_runs or len(calls) != 4:  # means, scores, choice, coarse output
            return None
        task = self._task
        first = means_call(tokens[:2], (task.grid, task.kv_grid), self.means[:2])
        last = means_call(tokens[2:], (task.kv_grid,), self.means[2:])
        first, last = (
            masked_calls.means_call(means, task.rule, of_keys)
            for means, of_keys in ((first, 1), (last, 0))
        )
        return [first, *calls[1:3]], [last, calls[3]]

    def _calls_by_runs(self, tokens: Sequence[Placeholder], bitmap: Placeholder) -> Iterator[Any]:
        task, (queries, keys) = self._task, self._rows
        grids, (matrices, rows) = (task.grid, task.kv_grid), _matrices(task)
        xs = tokens[: 3 if self.means else 2]
        yield sub_blocks.run_means_call(
            xs, (*grids, task.kv_grid), self._rows, self.means, task.runs
        )
        words = beginning(bitmap, matrices * rows, num_words(task.kv_grid.num_tiles))
        asked = sub_blocks.RunChoice(
            queries=queries,
            keys=keys,
            columns=task.kv_grid.num_tiles,
            has_empty=sub_blocks.has_empty(grids, task.runs),
            scale=task.scale,
            forced=None,
            counts=task.counts,
            mass=task.mass,
            query_tiles=task.grid.num_tiles,
        )
        yield from sub_blocks.choice_calls(asked, self._scores, words, SCORE_BYTES)
        if self.out is not None:
            *means, out = (as_matrices(x, matrices) for x in (*self.means, self.out))
            yield from attention_calls(means, task.scale, self._scores, out, SCORE_BYTES)


class CoarseBackward:
    """The coarse branch of a backward.

    Attributes:
        out: (B, heads, n_q, head_dim) fp32, the coarse output as the forward left it.
        grad: its gradient, part of the workspace; so are ``grad_means``.
        grad_means: gradients of the means of q, k and v.
    """

    def __init__(
        self,
        task: Task,
        of_out: Workspace,
        of_means: Workspace,
        work: Workspace,
        sizes: Sizes = NO_SIZES,
    ) -> None:
        """Where the forward left its coarse output and its means, and memory to work in."""
        self._sizes = sizes
        shapes = mean_shapes(task)
        self.out = of_out.part(shapes[0], torch.float32)
        self._means = [of_means.part(shape, torch.float32) for shape in shapes]
        self.grad = work.part(shapes[0], torch.float32)
        self.grad_means = [work.part(shape, torch.float32) for shape in shapes]
        self._matrices, rows = _matrices(task)
        columns = task.kv_grid.num_tiles
        numbers = score_numbers(self._matrices, rows, columns, PROBABILITY_BYTES)
        self._scratch = [work.part((numbers,), torch.float32) for _ in range(2)]
        self._mask = _mask(task)

    def calls(self, scale: float) -> Iterator[Any]:
        """From ``grad`` to ``grad_means``."""
        grad, out, *of_means = (
            as_matrices(x, self._matrices)
            for x in (self.grad, self.out, *self._means, *self.grad_means)
        )
        return gradient_calls(
            grad,
            out,
            of_means[:3],
            scale,
            of_means[3:],
            self._scratch,
            PROBABILITY_BYTES,
            self._mask,
            self._sizes[1],
        )
