# SPDX-License-Identifier: Apache-2.0
"""What ``torch.compile`` has made of a transformer or its parts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

PYTHON = sys.version_info[:3]
"""Of this process."""


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Without what ``compile`` has done to this module's parts, until it ends."""
    compiled = {part: part._compiled_call_impl for part in module.modules()}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def warn_where_changes_are_not_seen(transformer: Any) -> None:
    """Python 3.13.0 has a fault for which PyTorch leaves out guards of what modules hold.

    So what has run compiled goes on with the processors that it had then
    (findings/changed_under_python_3_13_0.sh). Whether it has run cannot be asked.
    """
    module = getattr(transformer, "_orig_mod", transformer)
    compiled = transformer is not module or any(
        part._compiled_call_impl is not None for part in module.modules()
    )
    if compiled and PYTHON == (3, 13, 0):
        warnings.warn(
            "transformer is compiled, and under Python 3.13.0 PyTorch does not see that its "
            "processors have changed: if it has run already, it goes on as before; compile it "
            "afterwards, or use another Python",
            stacklevel=3,
        )
