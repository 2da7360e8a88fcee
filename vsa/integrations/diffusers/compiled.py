# SPDX-License-Identifier: Apache-2.0
"""What ``torch.compile`` has made of a transformer or its parts, and ``torch.export`` may make."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vsa.integrations.diffusers.steps import step_is_said

PYTHON = sys.version_info[:3]
"""Of this process."""
UNTRACED = (
    "apply_vsa reads the grid and the step before every pass, which cannot be traced: use "
    "torch.export.export(..., strict=False), and for fullgraph=True compile the transformer or its "
    "blocks, not a function that calls it"
)
"""Why one graph cannot hold everything, for whoever asks PyTorch for it."""


def check_exported(settings: Any, recorded: bool) -> None:
    """Check that a pass may become a graph, if ``torch.export`` runs it.

    Args:
        settings: of the plan.
        recorded: whether somebody looks at what passes choose.

    Raises:
        NotImplementedError: it needs values, or what another pass has chosen.
    """
    if not torch.compiler.is_exporting():
        return
    if recorded:
        raise NotImplementedError(
            "collect looks at values, which torch.export has none of: export outside of it"
        )
    if settings.refresh_every > 1:
        raise NotImplementedError(
            "refresh_every must be 1 where torch.export runs the transformer, as no graph finds "
            f"what another has chosen, but it is {settings.refresh_every}: call apply_vsa again "
            "without it"
        )
    if settings.need_steps and not step_is_said():
        raise NotImplementedError(
            "dense_steps, or a topk or precision that is a function, takes effect by denoising "
            "steps, which torch.export, having no values, cannot tell: export a graph for each "
            "kind of step inside of denoising_step(step)"
        )


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
