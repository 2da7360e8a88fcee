# SPDX-License-Identifier: Apache-2.0
"""Names for the stages of ``vsa.attention`` while somebody looks: for ``vsa profile``.

Inside ``named`` the functions that attention calls for its stages are replaced by ones that run
them in a range; outside of it they are themselves. So nobody pays for ranges who does not profile,
and torch.compile never sees them (a record_function in the code would be traced and kept).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

COARSE, SELECT, FINE, COMBINE = "coarse", "select", "fine", "combine"
FINE_BACKWARD, MEANS_BACKWARD = "backward: fine", "backward: means"
FORWARD = (COARSE, SELECT, FINE, COMBINE)
BACKWARD = (FINE_BACKWARD, MEANS_BACKWARD)

Range = Callable[[str], AbstractContextManager[Any]]

# (module, function, stage), as it is named where it is called. With gates our own kernels run as
# one operator, which calls the functions of vsa.backends.kernels; without, it is that of
# vsa.stages.fine. That operator has no combine of its own without gradients, and its backward
# includes coarse and means. Where tiles are chosen for it, the coarse attention is part of the
# choice.
_CALLED = (
    ("vsa.functional", "tile_means", COARSE),
    ("vsa.stages.combine", "coarse_attention", COARSE),
    ("vsa.gated_ops", "coarse_attention", COARSE),
    ("vsa.functional", "select_tiles", SELECT),
    ("vsa.functional", "select_and_attend", SELECT),
    ("vsa.stages.combine", "fine", FINE),
    ("vsa.stages.combine", "combine", COMBINE),
    ("vsa.backends.kernels", "forward", FINE),
    ("vsa.backends.kernels", "combine", COMBINE),
    ("vsa.ops", "block_sparse_attention_backward", FINE_BACKWARD),
    ("vsa.gated_ops", "gated_attention_backward", FINE_BACKWARD),
    ("vsa.backends.pytorch_routing", "spread_means", MEANS_BACKWARD),
)


@contextmanager
def named(open_range: Range) -> Iterator[None]:
    """Run every stage inside ``open_range(stage)``, in this process, until it ends.

    The backward of the coarse attention and of gates outside our own kernels is PyTorch's and gets
    no range of its own.
    """
    modules = [importlib.import_module(module) for module, _, _ in _CALLED]
    originals = [
        getattr(module, name) for module, (_, name, _) in zip(modules, _CALLED, strict=True)
    ]
    try:
        for module, original, called in zip(modules, originals, _CALLED, strict=True):
            setattr(module, called[1], _inside(open_range, called[2], original))
        yield
    finally:
        for module, original, called in zip(modules, originals, _CALLED, strict=True):
            setattr(module, called[1], original)


def _inside(open_range: Range, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with open_range(stage):
            return function(*args, **kwargs)

    return in_range
