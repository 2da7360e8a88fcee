# SPDX-License-Identifier: Apache-2.0
"""Names for the stages of ``vsa.attention`` while somebody looks: for ``vsa profile``.

Inside ``named`` the methods of backends that compute the stages run in a range; outside of it they
are themselves. So ranges cost nothing where nothing is profiled, and torch.compile never sees them
(a record_function in the code would be traced and kept).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from vsa.backends import BACKENDS
from vsa.stages import eager

COARSE, SELECT, FINE, COMBINE = "coarse", "select", "fine", "combine"
FINE_BACKWARD, MEANS_BACKWARD = "backward: fine", "backward: means"
FORWARD = (COARSE, SELECT, FINE, COMBINE)
BACKWARD = (FINE_BACKWARD, MEANS_BACKWARD)

Range = Callable[[str], AbstractContextManager[Any]]

# Where gates are fused, the backward includes those of coarse and means, and combine is the end of
# the fine stage. Where tiles are chosen for a call with a coarse gate, the coarse attention is
# part of the choice; and so are means, where tiles are chosen by those of their runs.
_METHODS = {
    "tile_means": COARSE,
    "coarse_attention": COARSE,
    "select": SELECT,
    "select_by_sub_blocks": SELECT,
    "forward": FINE,
    "add_tail": FINE,
    "low_precision": FINE,
    "gated_low_precision": FINE,
    "gated_inference": FINE,
    "gated_forward": FINE,
    "combine": COMBINE,
    "backward": FINE_BACKWARD,
    "add_tail_gradients": FINE_BACKWARD,
    "gated_backward": FINE_BACKWARD,
    "spread_means": MEANS_BACKWARD,
}
"""Methods of a backend, and the stage that each of them is."""


@contextmanager
def named(open_range: Range) -> Iterator[None]:
    """Run every stage inside ``open_range(stage)``, in this process, until it ends.

    The backward of the coarse attention and of gates outside our own kernels is PyTorch's and gets
    no range of its own.
    """
    before = [dict(vars(backend)) for backend in BACKENDS.values()]
    try:
        for backend in BACKENDS.values():
            for method, stage in _METHODS.items():
                if original := getattr(backend, method, None):
                    setattr(backend, method, _inside(open_range, stage, original))
        with eager.paused():
            yield
    finally:
        for backend, attributes in zip(BACKENDS.values(), before, strict=True):
            vars(backend).clear()
            vars(backend).update(attributes)


def _inside(open_range: Range, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with open_range(stage):
            return function(*args, **kwargs)

    return in_range
