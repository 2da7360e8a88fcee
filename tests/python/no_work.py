# SPDX-License-Identifier: Apache-2.0
"""What "before any work is done" means: nothing but views may be made of tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class NoWork(TorchDispatchMode):
    """Any operator but a view fails the test: those of ``torch.ops.vsa``, kernels, collectives.

    Args:
        projections: whether those of a layer are allowed, since they make what is checked.
    """

    PROJECTIONS = ("aten.addmm", "aten.mm", "aten.bmm", "aten.add", "aten.t", "aten.cat")

    def __init__(self, projections: bool = False) -> None:
        super().__init__()
        self.allowed = self.PROJECTIONS if projections else ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not (getattr(func, "is_view", False) or name.rpartition(".")[0] in self.allowed):
            pytest.fail(f"{name} ran before the input was checked")
        return func(*args, **(kwargs or {}))


def is_named(name: str, sentence: str) -> bool:
    """Whether a sentence is about an argument: it begins with it, or has it as a whole word.

    ``topk[1]`` is another argument than ``topk``, ``kv_grid`` another than ``grid``. Names that
    sentences are full of anyway, such as k or must, count only at the beginning or as a subject.
    """
    word = rf"(?<![\w.\[]){re.escape(name)}(?![\w\[])"
    if re.match(word, sentence):
        return True
    if len(name) == 1:
        return re.search(rf"{word} (must|has|is)\b", sentence) is not None
    return name != "must" and re.search(word, sentence) is not None
