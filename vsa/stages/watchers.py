# SPDX-License-Identifier: Apache-2.0
"""When a call cannot run by a plan: who has to see its operators, and what kernels cannot read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

ALIGNMENT = 16
"""Bytes that addresses of a plan's tensors are a multiple of."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that no subclass sees the operators of."""

_paused = 0
_lock = threading.Lock()


@contextmanager
def paused() -> Iterator[None]:
    """Without plans, in the whole process: for whoever has to see each stage."""
    global _paused
    with _lock:
        _paused += 1
    try:
        yield
    finally:
        with _lock:
            _paused -= 1


def is_watched() -> bool:
    """Whether a mode, a transform, a trace or ``paused`` has to see the operators."""
    return (
        _paused > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
        or forward_ad._current_level >= 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _has_function_mode() -> bool:
    """Whether a mode sees functions, other than that of ``torch.set_default_device``."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def address_of(x: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 if kernels find none there that mean what they are."""
    if type(x) not in PLAIN or x.is_neg():
        return 0
    try:
        return x.data_ptr()  # 0 on the meta device, and where memory has been freed
    except RuntimeError:  # sparse, inside of vmap, ...
        return 0
