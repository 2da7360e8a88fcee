# SPDX-License-Identifier: Apache-2.0
"""What belongs to one forward pass: kept by the thread that runs it, and found by recomputation.

Activation checkpointing runs a layer, a block or the whole transformer again in the backward pass,
when other passes may have run since. A recomputed layer uses what its own forward used, or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOST_REMEMBERED = 256
"""Passes, or kinds of work of a layer, that are remembered; what goes beyond raises instead."""

AMBIGUOUS = (
    "{what} is recomputed by activation checkpointing, and which of several forward passes with "
    "other grids, budgets or steps it belongs to cannot be told: use the transformer's own "
    "enable_gradient_checkpointing(), or settings that do not depend on the step"
)

Value = TypeVar("Value", bound=Hashable)


class OfThread(threading.local):
    """Attributes that every thread has for itself; a copy starts empty.

    ``__init__`` sets them, in every thread anew: a default of the class is what torch.compile of
    PyTorch 2.11 reads for good, whatever the thread has set.
    """

    def __deepcopy__(self, memo: object) -> OfThread:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def recomputing() -> bool:
    """Whether this runs inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Remembered(Generic[Value]):
    """The different values that something has had, so that a single one is known for sure."""

    def __init__(self) -> None:
        self._values: dict[Value, None] = {}
        self._lost = False

    def add(self, value: Value) -> None:
        """Take note of a value."""
        if value not in self._values:
            self._lost |= len(self._values) >= MOST_REMEMBERED
            if not self._lost:
                self._values[value] = None

    def any(self, holds: Callable[[Value], bool]) -> bool:
        """Whether something holds for one of the values."""
        return any(map(holds, list(self._values)))

    def only(self, fits: Callable[[Value], bool], what: str) -> Value:
        """The one value that fits.

        Raises:
            RuntimeError: several do, or none does.
        """
        found = [value for value in list(self._values) if fits(value)]
        if len(found) != 1 or self._lost:
            raise RuntimeError(AMBIGUOUS.format(what=what))
        return found[0]


class Passes:
    """Recent passes of a transformer, by the memory that their input lies in.

    While a weak reference to a storage is held, no other storage can have its identity, so that a
    pass is never taken for another one, whoever recomputes it.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[StorageWeakRef, int, Any]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[()]]:  # a copy, also one in a file, starts empty
        return Passes, ()

    def add(self, x: Tensor, works: Mapping[int, Any]) -> None:
        """Take note of the works of a pass whose input is x."""
        if x.is_inference():  # has no gradient, and no version
            return
        entry = (StorageWeakRef(x.untyped_storage()), x._version, works)
        with self._lock:
            alive = [each for each in self._passes if not each[0].expired()]
            self._passes = [*alive[1 - MOST_REMEMBERED :], entry]

    def of(self, x: Tensor) -> Any:
        """The works of the pass whose input was x.

        Raises:
            RuntimeError: no pass is known to have had this input, or several that differ.
        """
        wanted = x.untyped_storage()._cdata
        with self._lock:
            found = [
                works
                for ref, version, works in self._passes
                if ref.cdata == wanted and version == x._version
            ]
        if not found or any(works != found[0] for works in found[1:]):
            raise RuntimeError(AMBIGUOUS.format(what="the transformer"))
        return found[0]


class BoundCheckpoint:
    """diffusers' checkpointing function, whose recomputation sees the work of its own forward.

    Attributes:
        original: the function that diffusers put there.
        layers: the sparse processors of a block.
    """

    def __init__(self, original: Callable[..., Any], layers: Callable[[Any], list[Any]]) -> None:
        self.original, self.layers = original, layers

    def __call__(self, block: Any, *args: Any) -> Any:
        """Checkpoint a block."""
        if torch.compiler.is_compiling():  # the work is part of the graph that is recomputed
            return self.original(block, *args)
        works = [(processor, processor.work) for processor in self.layers(block)]
        return self.original(partial(_with_works, works, block), *args)


def _with_works(works: list[tuple[Any, Any]], block: Callable[..., Any], *args: Any) -> Any:
    before = [(processor, processor.work) for processor, _ in works]
    try:
        for processor, work in works:
            processor.work = work
        return block(*args)
    finally:
        for processor, work in before:
            processor.work = work
