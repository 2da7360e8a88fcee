# SPDX-License-Identifier: Apache-2.0
"""Tensors inside of forward-mode differentiation or of a transform of torch.func.

Operators of our own have a backward and nothing else: a tangent would be lost in them without a
word. Where one is at stake, attention is composed of PyTorch's operators instead
(``vsa.backends.composed``), and the choice of tiles, through which nothing flows, is made of plain
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def is_transformed(x: object) -> bool:
    """Whether something is a tensor with a tangent, or inside of a transform."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    return _functorch.is_functorch_wrapped_tensor(x) or _has_tangent(x)


def first_transformed(tensors: Mapping[str, object]) -> str | None:
    """The name of the first that ``is_transformed``, None where none is."""
    for name, x in tensors.items():
        if is_transformed(x):
            return name
    return None


def is_batched(x: Tensor) -> bool:
    """Whether ``vmap`` hides an axis of a tensor."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def primal(x: Tensor) -> Tensor:
    """The numbers of a tensor, without tangent and history."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return (forward_ad.unpack_dual(x).primal if _has_tangent(x) else x).detach()


@contextmanager
def outside() -> Iterator[None]:
    """Without the transforms that are under way."""
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def savable(x: Tensor) -> Tensor:
    """A tensor that autograd may keep, which it refuses of those made in inference mode."""
    return x.clone() if must_be_copied(x) else x


def must_be_copied(x: Tensor) -> bool:
    """Whether ``savable`` makes a copy, which may have other strides."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return x.is_inference()
